"""The table of sampling fields agrees with the contract, the sampling parameters, the client and the README."""

import re
from pathlib import Path
from typing import Any

import pytest

from yuan_grpc.client import Parameters
from yuan_grpc.request.fields import FIELDS, Field
from yuan_grpc.request.notation import to_proto_json
from yuan_grpc.server.engine.types import Sampling
from yuan_grpc.v1 import yuan_pb2 as pb

ROOT = Path(__file__).parents[2]
DESCRIPTORS: Any = pb.GenerateRequest.DESCRIPTOR.fields_by_name
SCALARS = {
    int: ("CPPTYPE_INT32", "CPPTYPE_INT64", "CPPTYPE_UINT32"),
    float: ("CPPTYPE_DOUBLE",),
    bool: ("CPPTYPE_BOOL",),
    str: ("CPPTYPE_STRING",),
    dict: ("CPPTYPE_MESSAGE",),
}
MESSAGES = ("structured_outputs", "repetition_detection")
COMMENT_OF = re.compile(r"((?:^  //.*\n)+)^  [^/\n]*\b(\w+) = \d+;", re.MULTILINE)


def comments() -> dict[str, str]:
    """The comment of each field of `GenerateRequest` in the contract, as one line."""
    contract = (ROOT / "protos/yuan/v1/yuan.proto").read_text("utf-8")
    message = contract.partition("message GenerateRequest {")[2].partition("\n}\n")[0]
    return {name: " ".join(comment.replace("//", " ").split()) for comment, name in COMMENT_OF.findall(message)}


each_field = pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)


@each_field
def test_a_field_has_the_type_of_the_contract(field: Field) -> None:
    descriptor = DESCRIPTORS[field.name]
    assert field.is_list == descriptor.is_repeated
    if field.name != "logit_bias":
        assert descriptor.cpp_type in [getattr(descriptor, kind) for kind in SCALARS[field.type]]


@each_field
def test_the_contract_states_the_limits_of_a_field(field: Field) -> None:
    comment = comments()[field.name].replace(",", "").lower()
    if field.has_range:
        numbers = [field.minimum, *field.special] if field.maximum is None else [field.minimum, field.maximum]
        if field.name == "min_tokens":
            numbers.append(0)
        for number in numbers:
            name = "`n`" if field.name == "best_of" and number == 1 else str(number)
            assert re.search(rf"(?<![\d.]){re.escape(name)}(?![\d.]*\d)", comment), (name, comment)
    for limit in filter(None, (field.max_items, field.max_length)):
        assert str(limit) in comment


@each_field
def test_a_sampling_parameter_is_one_of_the_engine(field: Field) -> None:
    assert (field.name in Sampling.__dataclass_fields__) == (field.is_sampling or field.name in MESSAGES)


def test_every_sampling_parameter_is_in_the_table() -> None:
    assert set(Sampling.__dataclass_fields__) <= {field.name for field in FIELDS}


@each_field
def test_the_client_and_the_readme_know_a_field(field: Field) -> None:
    assert field.name in Parameters.__annotations__
    assert f"`{field.name}`" in (ROOT / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("field", "value", "is_allowed"),
    [
        (Field("x", float, 0, 1), 0, True),
        (Field("x", float, 0, 1), 1, True),
        (Field("x", float, 0, 1), 1.001, False),
        (Field("x", float, 0, 1), float("nan"), False),
        (Field("x", float, 0), float("inf"), True),
        (Field("x", int, 1), 0, False),
        (Field("x", int, 1, special=(-1,)), -1, True),
        (Field("x", int, 1, special=(-1,)), 0, False),
        (Field("x", int), -5, True),
    ],
)
def test_a_range_includes_its_ends_and_special_values(field: Field, value: float, is_allowed: bool) -> None:
    assert field.allows(value) is is_allowed


def test_a_rule_says_the_range_in_words() -> None:
    assert Field("x", float, 0, 1.5).rule == "be between 0 and 1.5"
    assert Field("x", int, 1).rule == "be at least 1"
    assert Field("x", int, 1, special=(-1,), special_meaning=", or -1 for all").rule == "be at least 1, or -1 for all"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("stop", "a", ["a"]),
        ("bad_words", "a", ["a"]),
        ("stop", ["a", "b"], ["a", "b"]),
        ("prompt_token_ids", [1], {"ids": [1]}),
        ("truncation_side", "left", "TRUNCATION_SIDE_LEFT"),
        ("truncation_side", "TRUNCATION_SIDE_RIGHT", "TRUNCATION_SIDE_RIGHT"),
        ("heartbeat_interval", 1.5, "1.5s"),
        ("heartbeat_interval", True, True),
        ("structured_outputs", {"choice": ["a"], "regex": None}, {"choice": {"values": ["a"]}}),
        ("structured_outputs", {"json": {"a": "中"}}, {"json": '{"a": "中"}'}),
        ("structured_outputs", {"json": "{}"}, {"json": "{}"}),
        ("structured_outputs", {"regex": "a+"}, {"regex": "a+"}),
        ("top_k", 5, 5),
    ],
)
def test_short_notations_become_protobufs_json(name: str, value: Any, expected: Any) -> None:
    assert to_proto_json(name, value) == expected
