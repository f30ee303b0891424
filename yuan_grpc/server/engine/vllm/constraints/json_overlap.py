"""Check that the schemas of a `oneOf` exclude each other, so that it means the same as `anyOf`."""

import json
from collections.abc import Callable, Iterator
from itertools import combinations, islice
from typing import Any

_ALL_TYPES = frozenset(("string", "number", "boolean", "null", "array", "object"))
_MAX_REFERENCES = 16
_MAX_ALTERNATIVES = 64
"""Limit on the schemas to compare: every pair is."""

Resolve = Callable[[object], object]


def may_overlap(schemas: list[Any], resolve: Resolve, tags: list[str]) -> bool:
    """Return whether two of the schemas may both be valid for a document.

    They exclude each other by type, by their `enum` or `const`, or by that of a property that both require.

    Args:
        resolve: returns the schema of a reference.
        tags: names of properties that are required wherever they are declared.
    """
    if len(schemas) > _MAX_ALTERNATIVES:
        return True
    limit = _MAX_ALTERNATIVES // len(schemas) + 1
    alternatives = [[*islice(_alternatives(one, resolve, _MAX_REFERENCES), limit + 1)] for one in schemas]
    return any(len(one) > limit for one in alternatives) or any(
        not _exclude_each_other(first, second, tags)
        for one, other in combinations(alternatives, 2)
        for first in one
        for second in other
    )


def _alternatives(schema: object, resolve: Resolve, references: int) -> Iterator[dict[str, Any]]:
    """Yield the schemas without references and combinations that a schema is a union of."""
    if not isinstance(schema, dict) or references == 0:
        yield {}
    elif "$ref" in schema:
        yield from _alternatives(resolve(schema["$ref"]), resolve, references - 1)
    elif isinstance(union := schema.get("anyOf", schema.get("oneOf")), list):
        for one in union:
            yield from _alternatives(one, resolve, references - 1)
    else:
        yield schema


def _exclude_each_other(one: dict[str, Any], other: dict[str, Any], tags: list[str]) -> bool:
    if not _types(one) & _types(other):
        return True
    values, others = _values(one), _values(other)
    if values is not None and others is not None and not values & others:
        return True
    return any(_is_discriminator(name, one, other) for name in _required(one, tags) & _required(other, tags))


def _is_discriminator(name: str, one: dict[str, Any], other: dict[str, Any]) -> bool:
    properties = [schema.get("properties") for schema in (one, other)]
    values = [_values(declared.get(name)) if isinstance(declared, dict) else None for declared in properties]
    first, second = values
    return first is not None and second is not None and not first & second


def _required(schema: dict[str, Any], tags: list[str]) -> set[str]:
    required, properties = schema.get("required"), schema.get("properties")
    names = [*required, *tags] if isinstance(required, list) else tags
    return {name for name in names if isinstance(name, str) and isinstance(properties, dict) and name in properties}


def _types(schema: dict[str, Any]) -> frozenset[str]:
    given = schema.get("type")
    names = given if isinstance(given, list) else [given]
    if given is None:
        values = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if not isinstance(values, list):
            return _ALL_TYPES
        names = [_type_of(value) for value in values]
    return frozenset("number" if name == "integer" else str(name) for name in names)


def _type_of(value: object) -> str:
    if isinstance(value, bool):
        return "boolean"
    types = {str: "string", int: "number", float: "number", list: "array", dict: "object"}
    return types.get(type(value), "null")


def _values(schema: object) -> set[str] | None:
    """Return the scalar values of `enum` or `const`; None if there are others or none."""
    values = schema.get("enum", [schema["const"]] if "const" in schema else None) if isinstance(schema, dict) else None
    if not isinstance(values, list) or any(isinstance(value, list | dict) for value in values):
        return None
    return {json.dumps(int(value) if isinstance(value, float) and value.is_integer() else value) for value in values}
