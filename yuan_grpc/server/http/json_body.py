"""Strict conversion of JSON bodies to messages."""

import json
import re
from collections.abc import Mapping, Sequence
from math import isinf
from typing import Any, NoReturn

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import ParseDict, ParseError

from yuan_grpc.request.notation import to_proto_json
from yuan_grpc.server.core.validation import reject
from yuan_grpc.server.errors import InvalidRequestError, Violation
from yuan_grpc.v1 import yuan_pb2 as pb

MAX_ENTRIES = 8192
"""Maximum entries of one field over all levels of nesting: above every field's own limit, and fast to parse."""

_FIELDS: Mapping[str, Any] = pb.GenerateRequest.DESCRIPTOR.fields_by_name
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_TYPES = {
    FieldDescriptor.CPPTYPE_INT32: "an integer",
    FieldDescriptor.CPPTYPE_INT64: "an integer",
    FieldDescriptor.CPPTYPE_UINT32: "an integer, 0 or more",
    FieldDescriptor.CPPTYPE_FLOAT: "a number",
    FieldDescriptor.CPPTYPE_DOUBLE: "a number",
    FieldDescriptor.CPPTYPE_BOOL: "true or false",
    FieldDescriptor.CPPTYPE_STRING: "a string",
    FieldDescriptor.CPPTYPE_ENUM: "one of the values in docs/api.md",
    FieldDescriptor.CPPTYPE_MESSAGE: "in the format of docs/api.md",
}


def parse_body(raw: bytes) -> dict[str, Any]:
    """Return a body's JSON object without null values, which mean absence.

    Raises:
        InvalidRequestError: the body is not a JSON object.
    """
    try:
        body = json.loads(raw.decode("utf-8-sig"), parse_constant=_reject_constant, parse_float=_finite_float)
        if _SURROGATE.search(raw):  # the parser accepts lone surrogates, which nothing after it can encode
            json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        reject("", "the body must be JSON in UTF-8, of finite numbers and not nested too deeply")
    if not isinstance(body, dict):
        reject("", "the body must be a JSON object")
    return {name: value for name, value in body.items() if value is not None}


def set_fields(request: pb.GenerateRequest, values: Mapping[str, Any]) -> None:
    """Set a request's fields by name.

    Raises:
        InvalidRequestError: with a violation for each unknown field and each value of the wrong type.
    """
    violations = [violation for name, value in values.items() if (violation := _set_field(request, name, value))]
    if violations:
        raise InvalidRequestError(violations)


def _set_field(request: pb.GenerateRequest, name: str, value: Any) -> Violation | None:
    field = _FIELDS.get(name)
    if field is None:
        return Violation(f"{name:.64}", f"`{name:.64}` must not be given: it is unknown or not supported here")
    if _has_too_many_entries(value):
        return Violation(name, f"`{name}` must have at most {MAX_ENTRIES} entries")
    try:
        if isinstance(value, bool) and field.cpp_type == FieldDescriptor.CPPTYPE_DOUBLE:
            raise ValueError("protobuf would accept it as 1 or 0")
        ParseDict({name: value}, request)
    except (ParseError, ValueError, OverflowError):
        return Violation(name, f"`{name}` must be {_expected_type(field)}")
    return None


def _expected_type(field: Any) -> str:
    if field.name == "heartbeat_interval":
        return 'a duration in seconds, such as "5s"'
    entry_type = _TYPES[field.cpp_type]
    if field.message_type and field.message_type.GetOptions().map_entry:
        return "an object of numbers by token id"
    return f"a list, each entry {entry_type}" if field.is_repeated else entry_type


def _has_too_many_entries(value: Any) -> bool:
    count, pending = 0, [value]
    while pending and count <= MAX_ENTRIES:
        current = pending.pop()
        if isinstance(current, (list, dict)):
            count += len(current)
            pending += current.values() if isinstance(current, dict) else current
    return count > MAX_ENTRIES


def convert_vllm_notation(fields: dict[str, Any]) -> None:
    """Convert fields in vLLM's notation to that of `GenerateRequest`, in place."""
    for name in fields.keys() - {"prompt_token_ids"}:
        try:
            fields[name] = to_proto_json(name, fields[name])
        except RecursionError:
            reject(name, f"`{name}` must not be nested too deeply")


def to_json(field: str, value: Any) -> str:
    """Return a parsed value as JSON text again."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        reject(field, f"`{field}` must not be nested too deeply")


def to_token_ids(field: str, values: Sequence[Any]) -> pb.TokenIds:
    """Return a list as token ids, which are not yet checked against the vocabulary."""
    if not all(type(value) is int and 0 <= value < 2**32 for value in values):
        reject(field, f"`{field}` must be a string, or a list of token ids")
    return pb.TokenIds(ids=values)


def pop_bool(fields: dict[str, Any], name: str) -> bool:
    """Remove a boolean field and return it; return False if it is absent."""
    value = fields.pop(name, False)
    if not isinstance(value, bool):
        reject(name, f"`{name}` must be true or false")
    return value


def _reject_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite_float(text: str) -> float:
    if isinf(value := float(text)):
        raise ValueError(f"{text} is out of range")
    return value
