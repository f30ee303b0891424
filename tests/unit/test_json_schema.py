"""Rewriting of JSON schemas and regular expressions to what the engine enforces."""

import json
from datetime import date, datetime, timedelta
from typing import Any, Literal
from uuid import UUID

import pytest
from pydantic import BaseModel, Field

from yuan_grpc.server.engine.vllm.constraints.json_schema import to_enforceable_schema
from yuan_grpc.server.engine.vllm.constraints.regex import UnsupportedConstraintError, to_enforceable_regex

INTEGER = {"type": "integer"}


def rewrite(schema: Any) -> Any:
    return json.loads(to_enforceable_schema(json.dumps(schema)))


@pytest.mark.parametrize(
    ("schema", "keyword", "pointer"),
    [
        ({"type": "array", "contains": INTEGER}, "contains", "/"),
        ({"type": "object", "propertyNames": {"maxLength": 3}}, "propertyNames", "/"),
        ({"type": "object", "patternProperties": {"a": {}}}, "patternProperties", "/"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired", "/"),
        ({"properties": {"a": {"not": INTEGER}}}, "not", "/properties/a"),
        ({"if": INTEGER, "then": {}}, "if", "/"),
        ({"items": [INTEGER, INTEGER]}, "value", "/items"),
        ({"type": "object", "required": ["b"], "additionalProperties": False}, "required", "/"),
        ({"type": "object", "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, "type", "/"),
        (
            {"$defs": {"a": {}}, "properties": {"x": {"$ref": "#/$defs/a", "maxLength": 2}}},
            "maxLength",
            "/properties/x",
        ),
        ({"$ref": "#/properties/a", "$defs": {}}, "$ref", "/"),
        ({"$ref": "http://example.org/schema"}, "$ref", "/"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf", "/"),
        ({"oneOf": [{"minimum": 3}, {"type": "string"}]}, "oneOf", "/"),
        ({"oneOf": [{"required": ["a"], "type": "object"}, {"type": "object"}]}, "oneOf", "/"),
        ({"allOf": [{"minimum": 3}, {"maximum": 4}]}, "allOf", "/"),
        ({"enum": [1, 50], "minimum": 60}, "enum", "/"),
        ({"const": 1, "type": "string"}, "const", "/"),
        ({"enum": ["ab"], "pattern": "^b"}, "pattern", "/"),
        ({"enum": [10**30]}, "enum", "/"),
        ({"type": "string", "format": "iban"}, "format", "/"),
        ({"type": "string", "format": "date", "maxLength": 4}, "format", "/"),
        ({"type": "string", "minLength": 5, "maxLength": 4}, "minLength", "/"),
        ({"pattern": "(?=a)"}, "pattern", "/"),
        ({"minimum": 3, "maxLength": 3}, "minimum", "/"),
        ({"type": "number", "multipleOf": 3}, "multipleOf", "/"),
        ({"type": "number", "minimum": 1e-9}, "minimum", "/"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems", "/"),
        ({"type": "array", "items": False, "minItems": 1}, "minItems", "/"),
        ({"properties": {"a": {}}, "additionalProperties": {"type": "string"}}, "additionalProperties", "/"),
        ({"type": "object", "minProperties": 2}, "minProperties", "/"),
        ({"type": "float"}, "type", "/"),
        ({"maxLenght": 3}, "maxLenght", "/"),
        ({"properties": {"a/b": False}, "required": ["a/b"]}, "false", "/properties/a~1b"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_keyword_that_cannot_be_enforced_is_named(schema: Any, keyword: str, pointer: str) -> None:
    with pytest.raises(UnsupportedConstraintError) as raised:
        rewrite(schema)
    assert f"`{keyword}`" in str(raised.value)
    assert str(raised.value).endswith((f"at {pointer})", f"at {pointer}"))


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (True, {}),
        ({"title": "T", "description": "d", "x-order": 1}, {}),
        ({"enum": [1, 50, "a"], "minimum": 10, "type": "integer"}, {"enum": [50]}),
        ({"enum": [1, True], "const": 1.0}, {"enum": [1]}),
        ({"minimum": 2.5, "exclusiveMaximum": 9, "type": "integer"}, {"type": "integer", "minimum": 3, "maximum": 8}),
        ({"minimum": 3}, {"type": "number", "minimum": 3}),
        ({"type": ["integer", "number"]}, {"type": "number"}),
        (
            {"type": ["null", "array"], "maxItems": 1},
            {"anyOf": [{"type": "null"}, {"type": "array", "items": {}, "maxItems": 1}]},
        ),
        ({"allOf": [INTEGER]}, INTEGER),
        ({"oneOf": [{"const": 1}, {"const": 2}]}, {"anyOf": [{"enum": [1]}, {"enum": [2]}]}),
        (
            {"required": ["b"], "additionalProperties": INTEGER},
            {"type": "object", "properties": {"b": INTEGER}, "additionalProperties": False, "required": ["b"]},
        ),
        (
            {"properties": {"a": {}}, "required": ["a", "b"], "maxProperties": 3, "minProperties": 1},
            {"type": "object", "properties": {"a": {}, "b": {}}, "additionalProperties": False, "required": ["a", "b"]},
        ),
        (
            {"$defs": {"a": {"title": "A", **INTEGER}, "unused": {"not": {}}}, "items": {"$ref": "#/$defs/a"}},
            {"type": "array", "items": {"$ref": "#/$defs/1"}, "$defs": {"1": INTEGER}},
        ),
    ],
    ids=range(13),
)
def test_a_schema_is_rewritten(schema: Any, expected: Any) -> None:
    assert rewrite(schema) == expected


def test_a_discriminated_union_is_enforced() -> None:
    def of(kind: str) -> Any:
        return {"type": "object", "properties": {"kind": {"const": kind}}, "required": ["kind"]}

    rewritten = rewrite({"$defs": {"b": of("b")}, "oneOf": [of("a"), {"$ref": "#/$defs/b"}]})
    assert [*rewritten] == ["anyOf", "$defs"]


def test_a_discriminator_is_required() -> None:
    def of(kind: str) -> Any:
        return {"type": "object", "properties": {"kind": {"const": kind, "default": kind}, "size": INTEGER}}

    union = {"oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}]}
    definitions = {"$defs": {"a": of("a"), "b": of("b")}}
    with pytest.raises(UnsupportedConstraintError, match="`oneOf`"):
        rewrite(union | definitions)
    rewritten = rewrite(union | definitions | {"discriminator": {"propertyName": "kind"}})
    assert [one["required"] for one in rewritten["$defs"].values()] == [["kind"], ["kind"]]


class Address(BaseModel):
    city: str
    parent: "Address | None" = None


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: int = 9


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"
    name: str


class User(BaseModel):
    """A model with the fields that structured outputs are used for."""

    name: str = Field(min_length=1, max_length=50, description="Full name", examples=["Li"])
    age: int | None = Field(None, ge=0, le=150)
    weight: float = Field(gt=0, lt=500)
    priority: Literal["low", "high"] = "low"
    version: Literal[1] = 1
    phone: str = Field(pattern=r"^\+?[0-9]{3,15}$")
    address: Address = Field(description="Where the user lives")
    others: list[Address] = Field(min_length=1, max_length=3)
    pet: Cat | Dog = Field(discriminator="kind")
    pets: list[Cat | Dog] = []
    point: tuple[int, str]
    counts: dict[str, int]
    payload: Any
    born: date
    seen: datetime
    session: UUID
    elapsed: timedelta


def test_the_schema_of_a_pydantic_model_is_accepted() -> None:
    schema = User.model_json_schema()
    assert [*rewrite(schema)["properties"]] == [*schema["properties"]]


def test_a_recursive_schema_is_enforced() -> None:
    tree = {"type": "object", "properties": {"children": {"type": "array", "items": {"$ref": "#"}}}}
    assert rewrite(tree)["properties"]["children"]["items"] == {"$ref": "#/$defs/0"}


def test_rewriting_is_bounded() -> None:
    nested: Any = {}
    for _ in range(100):
        nested = {"items": nested}
    with pytest.raises(UnsupportedConstraintError, match="64 levels"):
        rewrite(nested)
    doubling = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(30)} | {"d30": INTEGER}
    with pytest.raises(UnsupportedConstraintError, match="`oneOf`"):
        rewrite({"$defs": doubling, "oneOf": [{"$ref": "#/$defs/d0"}, {"type": "string"}]})
    with pytest.raises(UnsupportedConstraintError, match="`oneOf`"):
        rewrite({"oneOf": [{"const": number} for number in range(3000)]})


@pytest.mark.parametrize("text", ['{"minimum": NaN}', '{"enum": [1e999]}', '{"const": "\\ud800"}', '"a"', "3"])
def test_a_value_that_is_no_schema_is_rejected(text: str) -> None:
    with pytest.raises(UnsupportedConstraintError):
        to_enforceable_schema(text)


@pytest.mark.parametrize(
    ("pattern", "construct"),
    [
        ("(?=a)a", "lookahead"),
        ("(?!a)b", "negative lookahead"),
        ("(?<=a)b", "lookbehind"),
        ("(?<!a)b", "negative lookbehind"),
        (r"(a)\1", "backreference"),
        (r"(?<x>a)\k<x>", "backreference"),
        ("(?P<x>a)(?P=x)", "backreference"),
        (r"a\b", "word boundary"),
        ("(?i)a", "inline flag"),
        ("(?i:a)", "inline flag"),
        (r"\p{L}", "Unicode class"),
        (r"\A", "anchor"),
        ("a^b", "anchor ^"),
        ("a$b", "anchor $"),
        ("(^a|b)", "anchor ^"),
        ("(?>a)", "atomic group"),
        ("[]", "character class"),
        (r"[a\q]", r"\q"),
        (r"[^\s\S]", "do not exist"),
        ("\\", "escape"),
    ],
)
def test_an_expression_that_cannot_be_enforced_is_rejected_by_name(pattern: str, construct: str) -> None:
    with pytest.raises(UnsupportedConstraintError) as raised:
        to_enforceable_regex(pattern)
    assert construct in str(raised.value)


@pytest.mark.parametrize("pattern", ['a"', r"\\", r"\n", r"\x22", r"[\n\t]"])
def test_a_pattern_of_characters_that_json_escapes_is_rejected(pattern: str) -> None:
    to_enforceable_regex(pattern)
    with pytest.raises(UnsupportedConstraintError, match="JSON escapes"):
        to_enforceable_regex(pattern, in_json=True)
