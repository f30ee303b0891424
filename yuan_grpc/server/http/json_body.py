"""Bodies in JSON to messages, strictly."""

import json
import re
from collections.abc import Mapping, Sequence
from math import isinf
from typing import Any, NoReturn

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import ParseDict, ParseError

from yuan_grpc.server.core.validation import reject
from yuan_grpc.server.errors import InvalidRequestError, Violation
from yuan_grpc.v1 import yuan_pb2 as pb

MAX_ENTRIES = 8192
"""In one field, all levels together: more than any may have, and parsed before the event loop misses the time."""

_FIELDS: Mapping[str, Any] = pb.GenerateRequest.DESCRIPTOR.fields_by_name
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_KINDS = {
    FieldDescriptor.CPPTYPE_INT32: "an integer",
    FieldDescriptor.CPPTYPE_INT64: "an integer",
    FieldDescriptor.CPPTYPE_UINT32: "an integer, 0 or more",
    FieldDescriptor.CPPTYPE_FLOAT: "a number",
    FieldDescriptor.CPPTYPE_DOUBLE: "a number",
    FieldDescriptor.CPPTYPE_BOOL: "true or false",
    FieldDescriptor.CPPTYPE_STRING: "a text",
    FieldDescriptor.CPPTYPE_ENUM: "one of the values that docs/api.md has",
    FieldDescriptor.CPPTYPE_MESSAGE: "written as docs/api.md has it",
}


def decoded(raw: bytes) -> dict[str, Any]:
    """A body's object, without what is null: that is what absence is written as.

    Raises:
        InvalidRequestError: it is none.
    """
    try:
        body = json.loads(raw.decode("utf-8-sig"), parse_constant=_refused, parse_float=_finite)
        if _SURROGATE.search(raw):  # halves of characters pass the parser, and nothing after it
            json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        reject("", "the body must be JSON in UTF-8, of finite numbers and not nested too deeply")
    if not isinstance(body, dict):
        reject("", "the body must be a JSON object")
    return {name: value for name, value in body.items() if value is not None}


def fill(request: pb.GenerateRequest, values: Mapping[str, Any]) -> None:
    """Sets a request's fields by their names.

    Raises:
        InvalidRequestError: with a violation for each that is not there, or is given something else than it takes.
    """
    violations = [violation for name, value in values.items() if (violation := _set(request, name, value))]
    if violations:
        raise InvalidRequestError(violations)


def _set(request: pb.GenerateRequest, name: str, value: Any) -> Violation | None:
    field = _FIELDS.get(name)
    if field is None:
        return Violation(f"{name:.64}", f"`{name:.64}` must not be given: it is unknown or not supported here")
    if _has_many(value):
        return Violation(name, f"`{name}` must have at most {MAX_ENTRIES} entries")
    try:
        if isinstance(value, bool) and field.cpp_type == FieldDescriptor.CPPTYPE_DOUBLE:
            raise ValueError("protobuf would take it for 1 or 0")
        ParseDict({name: value}, request)
    except (ParseError, ValueError, OverflowError):
        return Violation(name, f"`{name}` must be {_kind(field)}")
    return None


def _kind(field: Any) -> str:
    if field.name == "heartbeat_interval":
        return 'a time in seconds, such as "5s"'
    one = _KINDS[field.cpp_type]
    if field.message_type and field.message_type.GetOptions().map_entry:
        return "an object of numbers by token id"
    return f"a list, each entry {one}" if field.is_repeated else one


def _has_many(value: Any) -> bool:
    count, levels = 0, [value]
    while levels and count <= MAX_ENTRIES:
        level = levels.pop()
        if isinstance(level, (list, dict)):
            count += len(level)
            levels += level.values() if isinstance(level, dict) else level
    return count > MAX_ENTRIES


def written_as_ours(fields: dict[str, Any]) -> None:
    """Rewrites what callers of vLLM may write otherwise than our messages have it: `stop` as a single text, and
    structured outputs as objects and plain lists."""
    if isinstance(fields.get("stop"), str):
        fields["stop"] = [fields["stop"]]
    if isinstance(outputs := fields.get("structured_outputs"), dict):
        outputs = {kind: value for kind, value in outputs.items() if value is not None}
        if isinstance(outputs.get("choice"), list):
            outputs["choice"] = {"values": outputs["choice"]}
        for kind in ("json", "structural_tag"):
            if isinstance(outputs.get(kind), dict):
                outputs[kind] = as_json(f"structured_outputs.{kind}", outputs[kind])
        fields["structured_outputs"] = outputs
    if isinstance(side := fields.get("truncation_side"), str) and side in ("left", "right"):
        fields["truncation_side"] = f"TRUNCATION_SIDE_{side.upper()}"


def as_json(field: str, value: Any) -> str:
    """A value of a body's as JSON text again."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        reject(field, f"`{field}` must not be nested too deeply")


def token_ids(field: str, values: Sequence[Any]) -> pb.TokenIds:
    """A list of token ids; whether they are those of tokens is not looked at."""
    if not all(type(value) is int and 0 <= value < 2**32 for value in values):
        reject(field, f"`{field}` must be a text, or a list of token ids")
    return pb.TokenIds(ids=values)


def flag(fields: dict[str, Any], name: str) -> bool:
    """Takes a field out that is true or false; false where it is absent."""
    value = fields.pop(name, False)
    if not isinstance(value, bool):
        reject(name, f"`{name}` must be true or false")
    return value


def _refused(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    if isinf(value := float(text)):
        raise ValueError(f"{text} is out of range")
    return value
