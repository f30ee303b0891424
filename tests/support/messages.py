"""Any message that a descriptor allows, for hypothesis: of likely values, of unlikely ones, or of both."""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

Values = Mapping[str, st.SearchStrategy[Any]]
"""Likely values by `Message.field`; for a list those of an item are `Message.field[]`, for a map pairs."""

DEPTH = 3
TEXTS = (
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
NO_NUMBERS = (float("nan"), float("inf"), float("-inf"))
SUBNORMAL = {FieldDescriptor.CPPTYPE_FLOAT: 1e-45, FieldDescriptor.CPPTYPE_DOUBLE: 5e-324}
RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
INTEGERS = (-2, -1, 0, 1, 2, 7, 16, 128, 129, 1024, 1169, 2048, 2**24)


def messages(
    kind: type[Message],
    likely: Values | None = None,
    sizes: tuple[int, int] = (0, 8),
    without: Collection[str] = (),
) -> st.SearchStrategy[Any]:
    """Messages with a few fields set, all others absent.

    Args:
        kind: their class.
        likely: the values of fields. A field that is not there, and every field where it is None, gets anything.
        sizes: how many fields are set at least, where there are so many, and at most.
        without: fields that stay absent.
    """
    descriptor: Any = kind.DESCRIPTOR
    return _message(descriptor, likely or {}, sizes, DEPTH, without)


@st.composite
def _message(
    draw: st.DrawFn,
    descriptor: Descriptor,
    likely: Values,
    sizes: tuple[int, int],
    depth: int,
    without: Collection[str] = (),
) -> Message:
    message, (least, most) = GetMessageClass(descriptor)(), sizes
    fields = [field for field in descriptor.fields if field.name not in without]
    if fields and depth:
        for field in draw(
            st.lists(st.sampled_from(fields), unique=True, min_size=min(least, len(fields)), max_size=most)
        ):
            _put(message, field, draw(_of_field(field, likely, depth)))
    return message


def _put(message: Message, field: FieldDescriptor, value: Any) -> None:
    if field.message_type and field.message_type.GetOptions().map_entry:
        for key, one in value:
            _put_entry(getattr(message, field.name), field.message_type.fields_by_name["value"], key, one)
    elif field.is_repeated:
        getattr(message, field.name).extend(value)
    elif field.message_type:
        getattr(message, field.name).SetInParent()
        getattr(message, field.name).CopyFrom(value)
    else:
        setattr(message, field.name, value)


def _put_entry(entries: Any, field: FieldDescriptor, key: Any, value: Any) -> None:
    if field.message_type:
        entries[key].CopyFrom(value)
    else:
        entries[key] = value


def _of_field(field: FieldDescriptor, likely: Values, depth: int) -> st.SearchStrategy[Any]:
    assert field.containing_type is not None
    name = f"{field.containing_type.name}.{field.name}"
    if name in likely:
        return likely[name]
    if field.message_type and field.message_type.GetOptions().map_entry:
        sides = [_of_one(field.message_type.fields_by_name[side], likely, depth) for side in ("key", "value")]
        return st.lists(st.tuples(*sides), max_size=3)
    one = likely.get(f"{name}[]") or _of_one(field, likely, depth)
    return _lists(one) if field.is_repeated else one


def _lists(items: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Short ones, and some that are too long for most fields."""
    return st.builds(lambda some, times: some * times, st.lists(items, max_size=3), st.sampled_from([1, 1, 1, 30, 700]))


def _of_one(field: FieldDescriptor, likely: Values, depth: int) -> st.SearchStrategy[Any]:
    if field.message_type:
        return likely.get(field.message_type.full_name) or _message(field.message_type, likely, (0, 3), depth - 1)
    return _SCALARS[field.cpp_type](field)


def _integers(field: FieldDescriptor) -> st.SearchStrategy[int]:
    low, high = RANGES[field.cpp_type]
    at_limits = [low, low + 1, high - 1, high, *(value for value in INTEGERS if low <= value <= high)]
    return st.sampled_from(at_limits) | st.integers(low, high)


def _floats(field: FieldDescriptor) -> st.SearchStrategy[float]:
    return st.sampled_from([*FLOATS, *NO_NUMBERS, SUBNORMAL[field.cpp_type]])


def _texts(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=8)
    return st.sampled_from(TEXTS) | st.text(max_size=4)


def _members(field: FieldDescriptor) -> st.SearchStrategy[int]:
    assert field.enum_type is not None
    return st.sampled_from([*field.enum_type.values_by_number, -1, 99])  # of an open enum, any number is one


_SCALARS: dict[int, Callable[[FieldDescriptor], st.SearchStrategy[Any]]] = {
    **dict.fromkeys(RANGES, _integers),
    **dict.fromkeys(SUBNORMAL, _floats),
    FieldDescriptor.CPPTYPE_BOOL: lambda _: st.booleans(),
    FieldDescriptor.CPPTYPE_STRING: _texts,
    FieldDescriptor.CPPTYPE_ENUM: _members,
}


def has_field(descriptor: Descriptor, path: str) -> bool:
    """Whether a violation's `a.b[3].c` is a field of the message."""
    return _walk(descriptor, re.sub(r"\[[^\]]*\]", "", path).split("."))


def _walk(descriptor: Descriptor | None, names: list[str]) -> bool:
    for name in names:
        field = descriptor.fields_by_name.get(name) if descriptor else None
        if field is None:
            return False
        descriptor = field.message_type
    return True
