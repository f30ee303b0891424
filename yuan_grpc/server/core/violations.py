"""Violations of common rules."""

from collections.abc import Iterator, Sequence

from yuan_grpc.server.errors import Violation


def violation(field: str, rule: str, value: object) -> Violation:
    """Return a violation whose description names the field, the rule and the value."""
    return Violation(field, f"`{field}` must {rule}, not {value}")


def string_violations(field: str, texts: Sequence[str], max_count: int, max_length: int) -> Iterator[Violation]:
    """Yield the first violation only: there may be thousands, and a status must stay small."""
    if violations := [*count_violations(field, texts, max_count, "strings")]:
        yield from violations
        return
    for index, text in enumerate(texts):
        if not 1 <= len(text) <= max_length:
            yield violation(f"{field}[{index}]", f"be 1 to {max_length} characters long", len(text))
            return


def count_violations(field: str, values: Sequence[object], limit: int, noun: str) -> Iterator[Violation]:
    """Yield a violation if there are too many values."""
    if len(values) > limit:
        yield violation(field, f"have at most {limit} {noun}", len(values))
