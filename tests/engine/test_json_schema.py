"""JSON schemas and regular expressions that are accepted are enforced.

Texts that a compiled grammar allows are sampled without a model and held against `jsonschema` and `re`.
"""

import json
import re
from contextlib import suppress
from typing import Any

import jsonschema
import pytest
from grammar_sampling import compiler, matches, sample_texts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from yuan_grpc.server.engine.vllm.constraints.grammars import compile_text, enforce
from yuan_grpc.server.engine.vllm.constraints.regex import UnsupportedConstraintError, to_enforceable_regex

pytestmark = pytest.mark.engine

CHECKER = jsonschema.Draft202012Validator.FORMAT_CHECKER


def check_documents(schema: Any, walks: int, seed: int = 0) -> int:
    """Check sampled documents against the original schema; return their number."""
    try:
        compiled = compile_text(compiler(), *enforce("json", json.dumps(schema), {}), {})
    except RuntimeError as error:
        if "json_schema_converter.cc" in str(error):  # xgrammar reports a contradiction
            return 0
        raise
    validator = jsonschema.Draft202012Validator(schema, format_checker=CHECKER)
    documents = [*sample_texts(compiled, walks, seed)]
    for document in documents:
        text = document.decode(errors="replace")  # as the engine does
        errors = [error.message for error in validator.iter_errors(json.loads(text))]
        assert not errors, (schema, text, errors)
    return len(documents)


NAMES = st.sampled_from(["a", "b", "c d", 'é"\\', "$x/~"])
SMALL = st.integers(0, 4)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-20, 20), st.floats(-5, 5, width=16), st.text(max_size=4))
BOUNDS = st.one_of(
    st.integers(-1200, 1200), st.integers(-4000, 4000).map(lambda n: n / 64), st.decimals(-3, 3, places=3).map(float)
)
PATTERNS = st.sampled_from(["^a+$", "[^a]b", ".c", r"\d{2}|\w", r"\S\s", "x|^y$", r"(?:a|\.)*", '"\\\\', "[é中]{1,2}"])


def objects_of(schemas: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries(
        {},
        optional={
            "type": st.just("object"),
            "properties": st.dictionaries(NAMES, schemas, max_size=3),
            "required": st.lists(NAMES, max_size=2, unique=True),
            "additionalProperties": st.one_of(st.booleans(), schemas),
            "minProperties": SMALL,
            "maxProperties": SMALL,
        },
    )


def arrays_of(schemas: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries(
        {"type": st.just("array")},
        optional={
            "items": st.one_of(st.booleans(), schemas),
            "prefixItems": st.lists(schemas, min_size=1, max_size=2),
            "minItems": SMALL,
            "maxItems": SMALL,
        },
    )


NUMBERS = st.fixed_dictionaries(
    {"type": st.sampled_from(["integer", "number", ["number", "null"]])},
    optional=dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), BOUNDS),
)
STRINGS = st.one_of(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["string", ["string", "integer"]])}, optional={"minLength": SMALL, "maxLength": SMALL}
    ),
    st.fixed_dictionaries({"pattern": PATTERNS}, optional={"type": st.just("string")}),
    st.sampled_from(["date", "time", "date-time", "uuid", "ipv4", "ipv6", "hostname", "email", "uri", "duration"]).map(
        lambda name: {"type": "string", "format": name}
    ),
)
VALUES = st.one_of(
    st.fixed_dictionaries(
        {"enum": st.lists(SCALARS, min_size=1, max_size=4)},
        optional={
            "type": st.sampled_from(["integer", "string", "number", ["string", "null"]]),
            "minimum": BOUNDS,
            "maxLength": SMALL,
        },
    ),
    SCALARS.map(lambda value: {"const": value}),
    st.just({"const": {"k": [1, "é\n", None]}}),
)
LEAVES = st.one_of(
    NUMBERS, STRINGS, VALUES, st.sampled_from([{}, True, {"type": "boolean"}, {"type": ["null", "object"]}])
)


def combined(schemas: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    lists = st.lists(schemas, min_size=1, max_size=3)
    return st.one_of(
        objects_of(schemas),
        arrays_of(schemas),
        lists.map(lambda some: {"anyOf": some}),
        lists.map(lambda some: {"oneOf": some}),
        schemas.map(lambda one: {"allOf": [one]}),
    )


SCHEMAS = st.recursive(LEAVES, combined, max_leaves=6)


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(schema=SCHEMAS, seed=st.integers(0, 2**16))
def test_documents_of_generated_schemas_are_valid(schema: Any, seed: int) -> None:
    with suppress(UnsupportedConstraintError):
        check_documents(schema, walks=8, seed=seed)


LITERALS = ["a", "b", "1", "中", "x", r"\.", r"\x5fa", r"\u4e2d"]
CLASSES = [
    "[ab]",
    "[^a]",
    "[a-c.-]",
    "[^中]",
    "[😀-🙏é-]",
    r"[\s\S]",
    r"[^\d\s]",
    ".",
    r"\d",
    r"\w",
    r"\S",
    r"\W",
    r"\D",
]
CHARACTERS = st.sampled_from([*LITERALS, *CLASSES])
QUANTIFIERS = st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{0,2}", "{2,}", "*?", "??"])


def composed(expressions: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.tuples(expressions, expressions).map("".join),
        st.tuples(expressions, expressions).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(expressions, QUANTIFIERS).map(lambda pair: f"({pair[0]}){pair[1]}"),
    )


EXPRESSIONS = st.recursive(CHARACTERS, composed, max_leaves=6)


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(expression=EXPRESSIONS, seed=st.integers(0, 2**16))
def test_texts_of_generated_expressions_match(expression: str, seed: int) -> None:
    compiled = compiler().compile_regex(to_enforceable_regex(expression))
    for text in sample_texts(compiled, 6, seed, max_bytes=60):
        for flags in (re.ASCII, re.UNICODE):
            assert re.fullmatch(expression, text.decode(), flags), (expression, text)
    check_documents({"type": "string", "pattern": expression}, 6, seed)


@pytest.mark.parametrize(
    ("pattern", "rejected"),
    [
        (".", "\n"),
        (".", "\r"),
        (".", "\u2028"),
        (r"\S", "\u3000"),
        (r"\w", "é"),
        ("^a$|^b$", "ab"),
        (r"[^\s]", "\u1680"),
    ],
)
def test_an_expression_does_not_match_other_texts(pattern: str, rejected: str) -> None:
    compiled = compiler().compile_regex(to_enforceable_regex(pattern))
    assert matches(compiled, "a") or pattern == "."
    assert not matches(compiled, rejected)


SCHEMAS_OF_THE_REPORT: dict[str, tuple[Any, str | None]] = {
    "undeclared required": ({"type": "object", "required": ["b"]}, None),
    "enum against bounds": (
        {
            "type": "object",
            "properties": {"a": {"type": "integer", "enum": [1, 50], "minimum": 10}},
            "required": ["a"],
            "additionalProperties": False,
        },
        None,
    ),
    "pattern without type": ({"pattern": "^a+$"}, None),
    "maxLength without type": ({"maxLength": 2}, None),
    "format without type": ({"format": "date"}, None),
    "contains": ({"type": "array", "contains": {"const": 1}}, "contains"),
    "propertyNames": ({"type": "object", "propertyNames": {"pattern": "^a$"}}, "propertyNames"),
    "minimum without type": ({"minimum": 10}, None),
    "anyOf of required": ({"type": "object", "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, "type"),
    "if": ({"type": "object", "if": {"required": ["a"]}, "then": {"required": ["b"]}}, "if"),
    "dependentRequired": ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    "not": ({"not": {"type": "integer"}}, "not"),
    "const against type": ({"type": "string", "const": 1}, "const"),
    "ref with siblings": ({"$defs": {"s": {"type": "string"}}, "$ref": "#/$defs/s", "maxLength": 1}, "maxLength"),
    "anyOf with siblings": ({"anyOf": [{"type": "integer"}, {"type": "string"}], "type": "integer"}, "type"),
    "overlapping oneOf": ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
    "control characters": ({"type": "string", "maxLength": 3}, None),
    "duplicate keys": (
        {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": True},
        None,
    ),
    "optional group of a pattern": ({"type": "string", "pattern": "^x(?:\\.[0-9]{1,6})?y$"}, None),
}
"""Schemas, with the keyword that is rejected; None if the schema is enforced."""


@pytest.mark.parametrize(("schema", "keyword"), SCHEMAS_OF_THE_REPORT.values(), ids=SCHEMAS_OF_THE_REPORT.keys())
def test_a_schema_is_enforced_or_its_keyword_is_named(schema: Any, keyword: str | None) -> None:
    if keyword is None:
        assert check_documents(schema, walks=200) > 0
    else:
        with pytest.raises(UnsupportedConstraintError, match=f"`{keyword}`"):
            check_documents(schema, walks=1)
