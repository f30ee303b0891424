"""Strict conversion of JSON bodies to messages."""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import islice
from math import isinf
from typing import Any, NoReturn

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import ParseDict, ParseError

from yuan_grpc.request.fields import BY_NAME
from yuan_grpc.request.notation import to_proto_json
from yuan_grpc.server.core.validation import reject
from yuan_grpc.server.errors import MAX_VIOLATIONS, InvalidRequestError, Violation
from yuan_grpc.v1 import yuan_pb2 as pb

MAX_NUMBERS = 2**18
"""Maximum numbers in a body: enough for the token ids of two contexts of 131,072 tokens."""
MAX_VALUES = 2**15
"""Maximum values of other kinds in a body, counting each key of an object."""
MAX_DIGITS = 500
"""Maximum digits of a number. Parsing takes time in proportion to their square."""
MAX_FIELDS = 256
"""Maximum fields at the top level of a body: more than all APIs have together."""
MAX_ENTRIES = 4096
"""Maximum entries over all levels of nesting of a field without a limit of its own."""

_FIELDS: Mapping[str, Any] = pb.GenerateRequest.DESCRIPTOR.fields_by_name
_ZERO_DIGITS = bytes.maketrans(b"123456789", b"0" * 9)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_TYPES = {
    FieldDescriptor.CPPTYPE_INT32: "an integer",
    FieldDescriptor.CPPTYPE_INT64: "an integer",
    FieldDescriptor.CPPTYPE_UINT32: "an integer, 0 or more",
    FieldDescriptor.CPPTYPE_FLOAT: "a number",
    FieldDescriptor.CPPTYPE_DOUBLE: "a number",
    FieldDescriptor.CPPTYPE_BOOL: "true or false",
    FieldDescriptor.CPPTYPE_STRING: "a string",
    FieldDescriptor.CPPTYPE_ENUM: "one of the values in docs/reference/api.md",
    FieldDescriptor.CPPTYPE_MESSAGE: "in the format of docs/reference/api.md",
}


def parse_body(raw: bytes) -> dict[str, Any]:
    """Return a body's JSON object without null values, which mean absence.

    Raises:
        InvalidRequestError: the body is not a JSON object, or has more values than the limits.
    """
    _check_structure(raw)
    try:
        body = json.loads(raw.decode("utf-8-sig"), parse_constant=_reject_constant, parse_float=_finite_float)
        if _SURROGATE.search(raw):  # the parser accepts lone surrogates, which nothing after it can encode
            _check_texts(body)
    except (ValueError, RecursionError):
        reject("", "the body must be UTF-8 JSON with finite numbers and limited nesting")
    if not isinstance(body, dict):
        reject("", "the body must be a JSON object")
    if len(body) > MAX_FIELDS:
        reject("", f"the body must be an object of at most {MAX_FIELDS} fields, not {len(body)}")
    return {name: value for name, value in body.items() if value is not None}


def _check_structure(raw: bytes) -> None:
    """Reject a body with more values than the limits, by counting bytes, without parsing it.

    The parser holds Python's lock, so that a thread would delay other requests as much as the event loop.
    """
    unescaped = raw.replace(rb"\\", b"__").replace(rb"\"", b"__")  # all remaining quotes delimit strings
    quotes = unescaped.count(b'"')
    if quotes > 2 * MAX_VALUES:
        _reject_values()
    outside = b"".join(unescaped.split(b'"')[::2])
    others = sum(map(outside.count, (b"[", b"{", b".", b"e", b"E")))  # lists, objects, fractions, exponents, booleans
    if quotes // 2 + others > MAX_VALUES or outside.count(b",") > MAX_NUMBERS + MAX_VALUES:
        _reject_values()
    if b"0" * (MAX_DIGITS + 1) in outside.translate(_ZERO_DIGITS):
        reject("", f"the body must be JSON with numbers of at most {MAX_DIGITS} digits")


def _reject_values() -> NoReturn:
    reject("", f"the body must be JSON of at most {MAX_NUMBERS} numbers and {MAX_VALUES} other values")


def _check_texts(body: Any) -> None:
    """Raise UnicodeEncodeError if a string has a lone surrogate."""
    pending = [body]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            value.encode()
        elif isinstance(value, dict):
            pending += [*value, *value.values()]
        elif isinstance(value, list):
            pending += [item for item in value if type(item) is not int]


def set_fields(request: pb.GenerateRequest, values: Mapping[str, Any]) -> None:
    """Set a request's fields by name.

    Raises:
        InvalidRequestError: with a violation for each unknown field and each value of the wrong type.
    """
    found = (violation for name, value in values.items() if (violation := _set_field(request, name, value)))
    if violations := list(islice(found, MAX_VIOLATIONS)):
        raise InvalidRequestError(violations)


def _set_field(request: pb.GenerateRequest, name: str, value: Any) -> Violation | None:
    field = _FIELDS.get(name)
    if field is None:
        return Violation(f"{name:.64}", f"`{name:.64}` must not be given: it is unknown or not supported here")
    if name == "early_stopping" and isinstance(value, (list, dict)):
        return Violation(name, f'`{name}` must be true, false or "never"')
    limit = _entry_limit(name)
    if _has_more_entries(value, limit):
        return Violation(name, f"`{name}` must have at most {limit} entries")
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


def _entry_limit(name: str) -> int:
    """Return the maximum entries of a field, so that converting a long list does not delay other requests."""
    field = BY_NAME.get(name)
    return field.max_items if field and field.is_list else MAX_ENTRIES


def _has_more_entries(value: Any, limit: int) -> bool:
    """Return whether a value has more than `limit` entries over all levels of nesting."""
    count, pending = 0, [value]
    while pending and count <= limit:
        current = pending.pop()
        if isinstance(current, (list, dict)):
            count += len(current)
            pending += current.values() if isinstance(current, dict) else current
    return count > limit


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
    if set(map(type, values)) - {int} or (values and not 0 <= min(values) <= max(values) < 2**32):
        reject(field, f"`{field}` must be a string, or a list of token ids")
    return pb.TokenIds(ids=values)


def pop_bool(fields: dict[str, Any], name: str, *, default: bool = False) -> bool:
    """Remove a boolean field and return it; return `default` if it is absent."""
    value = fields.pop(name, default)
    if not isinstance(value, bool):
        reject(name, f"`{name}` must be true or false")
    return value


def _reject_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite_float(text: str) -> float:
    if isinf(value := float(text)):
        raise ValueError(f"{text} is out of range")
    return value
