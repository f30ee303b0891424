"""Request fields from options, from `--set FIELD=JSON` and from JSON objects, under their names in the contract."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Mapping
from typing import Any

from google.protobuf.json_format import ParseDict, ParseError

from yuan_grpc.cli.common.errors import UsageError
from yuan_grpc.request.fields import FIELDS, Field
from yuan_grpc.request.notation import to_proto_json
from yuan_grpc.v1 import yuan_pb2 as pb

Fields = dict[str, Any]
"""Values by field name of GenerateRequest, in protobuf's JSON form or in the shorter form that `--set` accepts."""

PROMPT_FIELDS = ("prompt", "prompt_token_ids", "messages")

_FIELDS_BY_NAME: Any = pb.GenerateRequest.DESCRIPTOR.fields_by_name
_FIELDS_BY_JSON_NAME: Any = pb.GenerateRequest.DESCRIPTOR.fields_by_camelcase_name

_OPTIONS = tuple(field for field in FIELDS if field.help)


class FieldError(UsageError):
    """An unknown request field or an invalid value. The text names the field."""


def add_options(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    """Add the request's options except the prompt to the parser.

    Args:
        parser: the parser of a command.
        max_tokens: the default of `--max-tokens`.
    """
    group = parser.add_argument_group("sampling", "See docs/reference/api.md for each field's exact meaning.")
    for field in _OPTIONS:
        _add_option(group, field, max_tokens if field.name == "max_tokens" else None)
    group.add_argument("--model", metavar="NAME", help="name of a LoRA adapter")
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
    values = {name: getattr(options, name) for name in (*(field.name for field in _OPTIONS), "model")}
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
        ParseDict({name: to_proto_json(name, value)}, request)
    except (ParseError, ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split()).removeprefix(f"Failed to parse {name} field: ").rstrip(".")
        raise FieldError(f"`{name}` cannot be {_abbreviate(value)}: {reason}") from None


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


def _add_option(group: argparse._ArgumentGroup, field: Field, default: int | None) -> None:
    flags = ["--" + field.name.replace("_", "-")]
    if len(field.name) == 1:
        flags.insert(0, f"-{field.name}")
    text = field.help if default is None else f"{field.help} (default: {default})"
    if field.type is bool:
        group.add_argument(*flags, action="store_true", default=None, help=text)
    elif field.is_list:
        group.add_argument(*flags, action="append", metavar="TEXT", help=text)
    else:
        metavar = "N" if field.type is int else "X"
        group.add_argument(*flags, type=field.type, default=default, metavar=metavar, help=text)
