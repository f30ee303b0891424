"""The suggestion for a mistyped name."""

from collections.abc import Iterable


def suggest(name: str, candidates: Iterable[str]) -> str:
    """Return "; did you mean `X`?" for the candidate X that is most similar to the name, or "" if none is similar."""
    from difflib import get_close_matches  # imported for errors only

    similar = get_close_matches(name, candidates, n=1)
    return f"; did you mean `{similar[0]}`?" if similar else ""
