"""Values of `enum` and `const` in JSON schemas."""

import json
from decimal import Decimal

from yuan_grpc.server.engine.vllm.constraints.json_keywords import (
    BOUNDS,
    Schema,
    check_encodable,
    is_integer,
    read_bound,
    read_count,
    reject,
)

MAX_INTEGER = 2**63 - 1

_ALLOWED_WITH_VALUES = frozenset(("type", "minLength", "maxLength", *BOUNDS))
"""Keywords that may be next to `enum` and `const`; they filter the values."""


def to_enforceable_values(keywords: Schema, types: list[str], at: str) -> Schema:
    """Return a schema of the values of `enum` and `const` that the other keywords allow.

    Args:
        types: those that `type` allows.
        at: the JSON pointer of the schema.
    """
    for keyword in keywords:
        if keyword not in (*_ALLOWED_WITH_VALUES, "enum", "const"):
            reject(keyword, at, "next to `enum` or `const`")
    values = keywords.get("enum", [keywords.get("const")])
    if not isinstance(values, list):
        reject("enum", at, "unless it is a list")
    if "const" in keywords:
        values = [value for value in values if _canonical(value) == _canonical(keywords["const"])]
    allowed = [value for value in values if _is_valid(value, keywords, types, at)]
    if not allowed:
        reject("enum" if "enum" in keywords else "const", at, "all of whose values other keywords exclude")
    for value in allowed:
        _check_value(value, at)
    return {"enum": allowed}


def _is_valid(value: object, keywords: Schema, types: list[str], at: str) -> bool:
    if "type" in keywords and not any(_has_type(value, name) for name in types):
        return False
    if isinstance(value, str):
        low, high = read_count("minLength", keywords, at) or 0, read_count("maxLength", keywords, at)
        return low <= len(value) and (high is None or len(value) <= high)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    own = {keyword: keywords[keyword] for keyword in BOUNDS if keyword in keywords}
    bounds, number = {keyword: read_bound(keyword, own, at) for keyword in own}, Decimal(str(value))
    return (
        bounds.get("minimum", number) <= number <= bounds.get("maximum", number)
        and ("exclusiveMinimum" not in bounds or bounds["exclusiveMinimum"] < number)
        and ("exclusiveMaximum" not in bounds or number < bounds["exclusiveMaximum"])
    )


def _has_type(value: object, name: str) -> bool:
    if name == "integer":
        return is_integer(value)
    if name == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    types = {"string": str, "boolean": bool, "null": type(None), "array": list, "object": dict}
    return isinstance(value, types[name])


def _check_value(value: object, at: str) -> None:
    if isinstance(value, dict):
        for name, one in value.items():
            check_encodable(name, "enum", at)
            _check_value(one, at)
    elif isinstance(value, list):
        for one in value:
            _check_value(one, at)
    elif isinstance(value, str):
        check_encodable(value, "enum", at)
    elif isinstance(value, int | float) and not abs(value) <= MAX_INTEGER:
        reject("enum", at, f"of numbers above {MAX_INTEGER}")


def _canonical(value: object) -> str:
    """Return a text that is equal for equal JSON values."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, list):
        return f"[{','.join(map(_canonical, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{json.dumps(name)}:{_canonical(value[name])}' for name in sorted(value))}}}"
    return json.dumps(value)
