"""Fields of a request: from options, from `--set FIELD=JSON` and from JSON, in the contract's names."""

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
"""Values by field of GenerateRequest, as its JSON form has them."""

PROMPTS = ("prompt", "prompt_token_ids", "messages")

_KNOWN: Any = pb.GenerateRequest.DESCRIPTOR.fields_by_name
_CAMEL: Any = pb.GenerateRequest.DESCRIPTOR.fields_by_camelcase_name

_OPTIONS: tuple[tuple[str, type, str], ...] = (
    ("max_tokens", int, "the most tokens of an answer"),
    ("min_tokens", int, "at least so many tokens before an answer may end"),
    ("temperature", float, "0 to 2; 0 always takes the most likely token (default: 1)"),
    ("top_k", int, "sample from so many most likely tokens"),
    ("top_p", float, "sample from the most likely tokens that have this probability together"),
    ("min_p", float, "sample from tokens at least this fraction as likely as the likeliest"),
    ("seed", int, "makes sampling repeatable"),
    ("presence_penalty", float, "-2 to 2, once for each token that has been generated"),
    ("frequency_penalty", float, "-2 to 2, for each time a token has been generated"),
    ("repetition_penalty", float, "above 1 discourages tokens of prompt and answer"),
    ("best_of", int, "generate so many choices and return the best; the width of a beam search"),
    ("length_penalty", float, "of beam search: above 0 favours long answers"),
    ("model", str, "the name of a LoRA adapter"),
)
_SWITCHES = (
    ("use_beam_search", "search for the most likely answer; --best-of is the width"),
    ("ignore_eos", "go on past the end-of-text token"),
    ("echo", "put the prompt in front of the answer"),
)


class FieldError(UsageError):
    """A field that does not exist, or a value that it cannot have; the text says which."""


def add_options(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    """Declares what a request may have besides its prompt; `max_tokens` is that option's default."""
    group = parser.add_argument_group("sampling", "Each as in the API, whose reference is docs/api.md.")
    for name, kind, text in _OPTIONS:
        metavar = {int: "N", float: "X", str: "NAME"}[kind]
        if name == "max_tokens":
            text += f" (default: {max_tokens})"
        default = max_tokens if name == "max_tokens" else None
        group.add_argument(_flag(name), type=kind, default=default, metavar=metavar, help=text)
    group.add_argument("-n", "--n", type=int, metavar="N", help="how many choices to generate")
    group.add_argument("--stop", action="append", metavar="TEXT", help="ends an answer; can be given several times")
    for name, text in _SWITCHES:
        group.add_argument(_flag(name), action="store_true", default=None, help=text)
    group.add_argument(
        "--set",
        action="append",
        default=[],
        type=assignment,
        metavar="FIELD=JSON",
        help="any other field of GenerateRequest; can be given several times",
    )


def of(options: argparse.Namespace) -> Fields:
    """The fields that options give; `--set` wins."""
    names = [*(option[0] for option in _OPTIONS), *(switch[0] for switch in _SWITCHES), "n", "stop"]
    given = {name: getattr(options, name) for name in names}
    return {name: value for name, value in given.items() if value is not None} | dict(options.set)


def assignment(text: str) -> tuple[str, Any]:
    """A field and its value, of `FIELD=JSON`; the value of a text field may stand without quotes.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    name, equals, written = text.partition("=")
    try:
        if not equals:
            raise FieldError(f"must be FIELD=JSON, not {text!r}")
        name = named(name.strip())
        value = _value(name, written)
        _put(pb.GenerateRequest(), name, value)
    except FieldError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name, value


def named(name: str) -> str:
    """The field's name in the contract; its JSON name is taken too.

    Raises:
        FieldError: there is none.
    """
    if name in _KNOWN:
        return name
    if name in _CAMEL:
        return str(_CAMEL[name].name)
    near = difflib.get_close_matches(name, _KNOWN, n=1)
    hint = f"; is it `{near[0]}`?" if near else ""
    raise FieldError(f"GenerateRequest has no field `{name}`{hint}")


def request_of(fields: Mapping[str, Any]) -> pb.GenerateRequest:
    """The message that has these fields, of which one is the prompt; what is None stays absent.

    Raises:
        FieldError: a name or a value is not right. (The server says more of values.)
    """
    given = [name for name in PROMPTS if fields.get(name) is not None]
    if len(given) != 1:
        raise FieldError(f"one of {', '.join(PROMPTS)} must be given, not {' and '.join(given) or 'none'}")
    return message(fields)


def message(fields: Mapping[str, Any]) -> pb.GenerateRequest:
    """The same without a look at the prompt."""
    request = pb.GenerateRequest()
    for name, value in fields.items():
        _put(request, named(name), value)
    return request


def _put(request: pb.GenerateRequest, name: str, value: Any) -> None:
    try:
        ParseDict({name: _canonical(name, value)}, request)
    except (ParseError, ValueError, TypeError, AttributeError, RecursionError) as error:
        problem = " ".join(str(error).split()).removeprefix(f"Failed to parse {name} field: ").rstrip(".")
        raise FieldError(f"`{name}` cannot be {_shown(value)}: {problem}") from None


def _canonical(name: str, value: Any) -> Any:
    """What people write for a few fields, as protobuf's JSON has it."""
    if name in ("stop", "bad_words") and isinstance(value, str):
        return [value]
    if name == "prompt_token_ids" and isinstance(value, list):
        return {"ids": value}
    if name == "truncation_side" and value in ("left", "right"):
        return f"TRUNCATION_SIDE_{value.upper()}"
    if name == "heartbeat_interval" and isinstance(value, int | float):
        return f"{value}s"
    if name == "structured_outputs" and isinstance(value, dict):
        return {kind: _constraint(kind, one) for kind, one in value.items()}
    return value


def _constraint(kind: str, value: Any) -> Any:
    if kind == "choice" and isinstance(value, list):
        return {"values": value}
    if kind in ("json", "structural_tag") and isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return value


def _value(name: str, written: str) -> Any:
    is_text = _KNOWN[name].cpp_type == _KNOWN[name].CPPTYPE_STRING
    try:
        value = json.loads(written)
    except (ValueError, RecursionError):
        if not is_text and name not in ("truncation_side", "early_stopping", "heartbeat_interval"):
            raise FieldError(f"the value of `{name}` must be JSON, not {written!r}") from None
        return written
    return written if is_text and not isinstance(value, str | list) else value


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
