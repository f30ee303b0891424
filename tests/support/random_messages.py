"""Hypothesis strategies for protobuf messages, with given likely values, arbitrary values, or both."""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

Values = Mapping[str, st.SearchStrategy[Any]]
"""Strategies by `Message.field`, or by `Message.field[]` for the items of a list. A map's values are pairs."""

MAX_DEPTH = 3
STRINGS = (
    *("", " ", "\n\t", "\0", "\x7f\x1b[0m", "a", "AB", "def add(a, b):", "世界上最高的山是什么", "é", "e\u0301"),
    *(
        "😀",
        "👩‍👩‍👧",
        "\ufffd",
        "\ufeff",
        "\u202e",
        "\U0010ffff",
        "▁",
        "<0xE4>",
        "</s>",
        "<eod>",
        "<sep>",
        "<pad>",
        "<n>",
    ),
    *(
        "a<eod>b",
        "<mask><mask>",
        "x" * 257,
        "长" * 1025,
        "never",
        "user",
        "%s{}\\",
        '"',
        "../x",
        "((((",
        "[",
        "{",
        "null",
    ),
)
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-9, 2.0, 2.0000001, 100.0, 1e30, -1e30)
NON_FINITE = (float("nan"), float("inf"), float("-inf"))
SUBNORMAL = {FieldDescriptor.CPPTYPE_FLOAT: 1e-45, FieldDescriptor.CPPTYPE_DOUBLE: 5e-324}
RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
INTEGERS = (-2, -1, 0, 1, 2, 7, 16, 128, 129, 1024, 1169, 2048, 2**24)


def messages(
    message_class: type[Message],
    likely: Values | None = None,
    sizes: tuple[int, int] = (0, 8),
    without: Collection[str] = (),
) -> st.SearchStrategy[Any]:
    """Return a strategy for messages with a few fields set.

    Args:
        message_class: the class of the messages.
        likely: strategies for the values of fields; other fields, or all if None, get arbitrary values.
        sizes: minimum and maximum number of fields that are set.
        without: fields that are never set.
    """
    descriptor: Any = message_class.DESCRIPTOR
    return _message(descriptor, likely or {}, sizes, MAX_DEPTH, without)


@st.composite
def _message(
    draw: st.DrawFn,
    descriptor: Descriptor,
    likely: Values,
    sizes: tuple[int, int],
    depth: int,
    without: Collection[str] = (),
) -> Message:
    message, (min_fields, max_fields) = GetMessageClass(descriptor)(), sizes
    fields = [field for field in descriptor.fields if field.name not in without]
    if fields and depth:
        for field in draw(
            st.lists(st.sampled_from(fields), unique=True, min_size=min(min_fields, len(fields)), max_size=max_fields)
        ):
            _set_field(message, field, draw(_field_values(field, likely, depth)))
    return message


def _set_field(message: Message, field: FieldDescriptor, value: Any) -> None:
    if field.message_type and field.message_type.GetOptions().map_entry:
        for key, entry in value:
            _set_map_entry(getattr(message, field.name), field.message_type.fields_by_name["value"], key, entry)
    elif field.is_repeated:
        getattr(message, field.name).extend(value)
    elif field.message_type:
        getattr(message, field.name).SetInParent()
        getattr(message, field.name).CopyFrom(value)
    else:
        setattr(message, field.name, value)


def _set_map_entry(entries: Any, field: FieldDescriptor, key: Any, value: Any) -> None:
    if field.message_type:
        entries[key].CopyFrom(value)
    else:
        entries[key] = value


def _field_values(field: FieldDescriptor, likely: Values, depth: int) -> st.SearchStrategy[Any]:
    assert field.containing_type is not None
    name = f"{field.containing_type.name}.{field.name}"
    if name in likely:
        return likely[name]
    if field.message_type and field.message_type.GetOptions().map_entry:
        entry_fields = field.message_type.fields_by_name
        entries = st.tuples(*[_single_values(entry_fields[part], likely, depth) for part in ("key", "value")])
        return st.lists(entries, max_size=3)
    values = likely.get(f"{name}[]") or _single_values(field, likely, depth)
    return _lists(values) if field.is_repeated else values


def _lists(items: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Return a strategy for short lists, and some that are too long for most fields."""
    return st.builds(
        lambda values, times: values * times, st.lists(items, max_size=3), st.sampled_from([1, 1, 1, 30, 700])
    )


def _single_values(field: FieldDescriptor, likely: Values, depth: int) -> st.SearchStrategy[Any]:
    if field.message_type:
        return likely.get(field.message_type.full_name) or _message(field.message_type, likely, (0, 3), depth - 1)
    return _SCALARS[field.cpp_type](field)


def _integers(field: FieldDescriptor) -> st.SearchStrategy[int]:
    low, high = RANGES[field.cpp_type]
    limits = [low, low + 1, high - 1, high, *(value for value in INTEGERS if low <= value <= high)]
    return st.sampled_from(limits) | st.integers(low, high)


def _floats(field: FieldDescriptor) -> st.SearchStrategy[float]:
    return st.sampled_from([*FLOATS, *NON_FINITE, SUBNORMAL[field.cpp_type]])


def _strings(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=8)
    return st.sampled_from(STRINGS) | st.text(max_size=4)


def _enum_values(field: FieldDescriptor) -> st.SearchStrategy[int]:
    assert field.enum_type is not None
    return st.sampled_from([*field.enum_type.values_by_number, -1, 99])  # an open enum accepts any number


_SCALARS: dict[int, Callable[[FieldDescriptor], st.SearchStrategy[Any]]] = {
    **dict.fromkeys(RANGES, _integers),
    **dict.fromkeys(SUBNORMAL, _floats),
    FieldDescriptor.CPPTYPE_BOOL: lambda _: st.booleans(),
    FieldDescriptor.CPPTYPE_STRING: _strings,
    FieldDescriptor.CPPTYPE_ENUM: _enum_values,
}


def has_field(descriptor: Descriptor, path: str) -> bool:
    """Return whether a violation's path, such as `a.b[3].c`, names a field of the message."""
    return _has_path(descriptor, re.sub(r"\[[^\]]*\]", "", path).split("."))


def _has_path(descriptor: Descriptor | None, names: list[str]) -> bool:
    for name in names:
        field = descriptor.fields_by_name.get(name) if descriptor else None
        if field is None:
            return False
        descriptor = field.message_type
    return True
