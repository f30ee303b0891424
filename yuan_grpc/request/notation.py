"""Short notations of request fields, converted to protobuf's JSON form.

The client, the command line and HTTP bodies accept these: one text where the field is a list, a plain list of choices,
a JSON object where the field is JSON text, a side without its prefix, and an interval as a number of seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

TEXT_LISTS = ("stop", "bad_words")
JSON_CONSTRAINTS = ("json", "structural_tag")
"""Constraints whose value is JSON text."""


def to_proto_json(name: str, value: Any) -> Any:
    """Return the value of a request field in protobuf's JSON form; a value in another notation is unchanged.

    Raises:
        RecursionError: a constraint is nested too deeply.
    """
    if name in TEXT_LISTS and isinstance(value, str):
        return to_list(value)
    if name == "prompt_token_ids" and isinstance(value, list):
        return {"ids": value}
    if name == "truncation_side" and value in ("left", "right"):
        return to_truncation_side(value)
    if name == "heartbeat_interval" and isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value}s"
    if name == "structured_outputs" and isinstance(value, dict):
        return {kind: _constraint(kind, spec) for kind, spec in value.items() if spec is not None}
    return value


def _constraint(kind: str, value: Any) -> Any:
    if kind == "choice" and isinstance(value, list):
        return {"values": value}
    return to_json_text(value) if kind in JSON_CONSTRAINTS else value


def to_list(value: str | Iterable[str]) -> list[str]:
    """Return a text as a list with one item, and a list unchanged."""
    return [value] if isinstance(value, str) else list(value)


def to_json_text(value: Any) -> Any:
    """Return an object as JSON text, and any other value unchanged."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping) else value


def to_truncation_side(side: str) -> str:
    """Return the name of a `TruncationSide` value, given its last word."""
    return f"TRUNCATION_SIDE_{side.upper()}"
