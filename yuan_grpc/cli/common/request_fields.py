"""Request fields from options, from `--set FIELD=JSON` and from JSON objects, under their names in the contract."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Mapping
from typing import Any

from google.protobuf.json_format import ParseDict, ParseError

from yuan_grpc.cli.common.errors import UsageError
from yuan_grpc.v1 import yuan_pb2 as pb

Fields = dict[str, Any]
"""Values by field name of GenerateRequest, in protobuf's JSON form or in the shorter form that `--set` accepts."""

PROMPT_FIELDS = ("prompt", "prompt_token_ids", "messages")

_FIELDS_BY_NAME: Any = pb.GenerateRequest.DESCRIPTOR.fields_by_name
_FIELDS_BY_JSON_NAME: Any = pb.GenerateRequest.DESCRIPTOR.fields_by_camelcase_name

_OPTIONS: tuple[tuple[str, type, str], ...] = (
    ("max_tokens", int, "maximum number of generated tokens"),
    ("min_tokens", int, "minimum number of generated tokens"),
    ("temperature", float, "sampling temperature, 0 to 2; 0 is greedy (default: 1)"),
    ("top_k", int, "sample from the N most likely tokens"),
    ("top_p", float, "nucleus sampling: total probability to keep"),
    ("min_p", float, "minimum probability, relative to the likeliest token"),
    ("seed", int, "random seed, for repeatable sampling"),
    ("presence_penalty", float, "penalty for tokens already generated, -2 to 2"),
    ("frequency_penalty", float, "penalty per occurrence of a generated token, -2 to 2"),
    ("repetition_penalty", float, "above 1: penalize tokens of the prompt and the output"),
    ("best_of", int, "generate N choices, return the best; beam width"),
    ("length_penalty", float, "beam search: above 0 favors longer output"),
    ("model", str, "name of a LoRA adapter"),
)
_SWITCHES = (
    ("use_beam_search", "use beam search with a width of --best-of"),
    ("ignore_eos", "continue after the end-of-text token"),
    ("echo", "include the prompt in the output"),
)


class FieldError(UsageError):
    """An unknown request field or an invalid value. The text names the field."""


def add_options(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    """Add the request's options except the prompt to the parser.

    Args:
        parser: the parser of a command.
        max_tokens: the default of `--max-tokens`.
    """
    group = parser.add_argument_group("sampling", "See docs/api.md for each field's exact meaning.")
    for name, kind, text in _OPTIONS:
        metavar = {int: "N", float: "X", str: "NAME"}[kind]
        if name == "max_tokens":
            text += f" (default: {max_tokens})"
        default = max_tokens if name == "max_tokens" else None
        group.add_argument(_flag(name), type=kind, default=default, metavar=metavar, help=text)
    group.add_argument("-n", "--n", type=int, metavar="N", help="number of choices (default: 1)")
    group.add_argument("--stop", action="append", metavar="TEXT", help="stop at this text; repeatable")
    for name, text in _SWITCHES:
        group.add_argument(_flag(name), action="store_true", default=None, help=text)
    group.add_argument(
        "--set",
        action="append",
        default=[],
        type=parse_assignment,
        metavar="FIELD=JSON",
        help="set any other field of GenerateRequest; repeatable",
    )


def from_options(options: argparse.Namespace) -> Fields:
    """Return the fields set by options. `--set` takes precedence."""
    names = [*(option[0] for option in _OPTIONS), *(switch[0] for switch in _SWITCHES), "n", "stop"]
    values = {name: getattr(options, name) for name in names}
    return {name: value for name, value in values.items() if value is not None} | dict(options.set)


def parse_assignment(text: str) -> tuple[str, Any]:
    """Return the field and the value of `FIELD=JSON`. A text value may omit the quotes.

    Raises:
        argparse.ArgumentTypeError: the text has another form, the field is unknown or the value is invalid.
    """
    name, equals, value_text = text.partition("=")
    try:
        if not equals:
            raise FieldError(f"must be FIELD=JSON, not {text!r}")
        name = field_name(name.strip())
        value = _parse_value(name, value_text)
        _set_field(pb.GenerateRequest(), name, value)
    except FieldError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name, value


def field_name(name: str) -> str:
    """Return the field's name in the contract, given that name or its JSON (camel case) form.

    Raises:
        FieldError: GenerateRequest has no such field.
    """
    if name in _FIELDS_BY_NAME:
        return name
    if name in _FIELDS_BY_JSON_NAME:
        return str(_FIELDS_BY_JSON_NAME[name].name)
    similar = difflib.get_close_matches(name, _FIELDS_BY_NAME, n=1)
    hint = f"; did you mean `{similar[0]}`?" if similar else ""
    raise FieldError(f"GenerateRequest has no field `{name}`{hint}")


def build_request(fields: Mapping[str, Any]) -> pb.GenerateRequest:
    """Return a request with these fields, exactly one of them a prompt. None leaves a field absent.

    Raises:
        FieldError: a field is unknown or has a value of the wrong type. The server checks ranges.
    """
    prompts = [name for name in PROMPT_FIELDS if fields.get(name) is not None]
    if len(prompts) != 1:
        raise FieldError(f"one of {', '.join(PROMPT_FIELDS)} must be set, not {' and '.join(prompts) or 'none'}")
    return build_partial_request(fields)


def build_partial_request(fields: Mapping[str, Any]) -> pb.GenerateRequest:
    """Return a request with these fields, with or without a prompt; see `build_request`."""
    request = pb.GenerateRequest()
    for name, value in fields.items():
        _set_field(request, field_name(name), value)
    return request


def _set_field(request: pb.GenerateRequest, name: str, value: Any) -> None:
    try:
        ParseDict({name: _to_protobuf_json(name, value)}, request)
    except (ParseError, ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split()).removeprefix(f"Failed to parse {name} field: ").rstrip(".")
        raise FieldError(f"`{name}` cannot be {_abbreviate(value)}: {reason}") from None


def _to_protobuf_json(name: str, value: Any) -> Any:
    """Expand the shorter forms that some fields accept to protobuf's JSON form."""
    if name in ("stop", "bad_words") and isinstance(value, str):
        return [value]
    if name == "prompt_token_ids" and isinstance(value, list):
        return {"ids": value}
    if name == "truncation_side" and value in ("left", "right"):
        return f"TRUNCATION_SIDE_{value.upper()}"
    if name == "heartbeat_interval" and isinstance(value, int | float):
        return f"{value}s"
    if name == "structured_outputs" and isinstance(value, dict):
        return {kind: _expand_constraint(kind, constraint) for kind, constraint in value.items()}
    return value


def _expand_constraint(kind: str, value: Any) -> Any:
    if kind == "choice" and isinstance(value, list):
        return {"values": value}
    if kind in ("json", "structural_tag") and isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return value


def _parse_value(name: str, text: str) -> Any:
    is_text = _FIELDS_BY_NAME[name].cpp_type == _FIELDS_BY_NAME[name].CPPTYPE_STRING
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        if not is_text and name not in ("truncation_side", "early_stopping", "heartbeat_interval"):
            raise FieldError(f"the value of `{name}` must be JSON, not {text!r}") from None
        return text
    return text if is_text and not isinstance(value, str | list) else value


def _abbreviate(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
