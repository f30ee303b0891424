"""Rewriting of constraints to what the engine enforces."""

import json
import re
from typing import Any

from yuan_grpc.server.engine.vllm.constraints.json_schema import to_enforceable_schema
from yuan_grpc.server.engine.vllm.constraints.regex import UnsupportedConstraintError, to_enforceable_regex

_LARK_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|(?:#|//)[^\n]*|/((?:\\.|[^/\\\n])+)/')
"""A string, a comment, or a regular expression, which is captured."""


def to_enforceable(kind: str, text: str) -> str:
    """Return a constraint that the engine enforces.

    Args:
        kind: the kind of constraint: `json`, `regex`, `structural_tag`, `lark` or `grammar` (EBNF).
        text: the constraint.

    Raises:
        UnsupportedConstraintError: it has a part that the engine would not enforce.
    """
    try:
        return _to_enforceable(kind, text)
    except RecursionError:
        raise UnsupportedConstraintError("must not be nested deeply") from None


def _to_enforceable(kind: str, text: str) -> str:
    match kind:
        case "json":
            return to_enforceable_schema(text)
        case "regex":
            return to_enforceable_regex(text)
        case "structural_tag":
            return json.dumps(_tag(json.loads(text)), ensure_ascii=False)
        case "lark":
            for expression in filter(None, _LARK_TOKEN.findall(text)):
                to_enforceable_regex(expression.replace("\\/", "/"))
    return text


def _tag(value: Any) -> Any:
    """Return a structural tag with the schemas and expressions in it rewritten."""
    if isinstance(value, list):
        return [_tag(one) for one in value]
    if not isinstance(value, dict):
        return value
    result = {}
    for key, one in value.items():
        if key in ("json_schema", "schema") and isinstance(one, dict | bool):
            result[key] = json.loads(to_enforceable_schema(json.dumps(one)))
        elif key == "pattern" and isinstance(one, str) and value.get("type") == "regex":
            result[key] = to_enforceable_regex(one)
        else:
            result[key] = _tag(one)
    return result
