"""Suggestions for misspelled options."""

from __future__ import annotations

from collections.abc import Iterable

SIMILARITY = 0.75
"""Least similarity of a suggested option, 0 to 1."""


def suggestion(option: str, known: Iterable[str]) -> str:
    """Return ": did you mean --model?" for the most similar known option, or an empty text if none is similar."""
    from difflib import get_close_matches  # only after an error

    matches = get_close_matches(option.partition("=")[0].replace("_", "-"), sorted(known), 1, SIMILARITY)
    return f": did you mean {matches[0]}?" if matches else ""
