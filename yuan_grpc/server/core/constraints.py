"""Limits on structured outputs that are checked before anything compiles them."""

import json
import re
from collections.abc import Iterator, Sequence

from yuan_grpc.server.core.convert import ParsedRequest
from yuan_grpc.server.core.violations import string_violations, violation
from yuan_grpc.server.engine.types import ModelInfo
from yuan_grpc.server.errors import Violation

MAX_CHOICE_TEXTS = 1024
"""Texts of a `choice`."""
MAX_CHOICE_TEXT_LENGTH = 1024
"""Characters of each of them."""
MAX_CONSTRAINT_BYTES = 32_768
"""Size of all texts in a constraint. Much larger ones take minutes to compile; deep nesting crashes the compiler."""
MAX_REPETITIONS = 2000
"""Sum of the `{m,n}` counts in a constraint. Tens of thousands take minutes to compile, without a timeout."""


def constraint_violations(parsed: ParsedRequest, info: ModelInfo) -> Iterator[Violation]:
    """Yield the violations of a constraint that need no compiler."""
    request = parsed.request
    if not request.HasField("structured_outputs"):
        return
    constraint, field = request.structured_outputs, "structured_outputs"
    kind = constraint.WhichOneof("constraint")
    if kind is None:
        yield Violation(field, f"`{field}` must have a constraint")
    elif kind == "choice":
        yield from _choice_violations(f"{field}.choice.values", constraint.choice.values)
    elif kind == "json_object":
        if not constraint.json_object:
            yield violation(f"{field}.json_object", "be true if given", "false")
    else:
        yield from _specification_violations(f"{field}.{kind}", kind, getattr(constraint, kind))
    for other in ("ignore_eos", "min_tokens"):  # either would continue after the constraint is satisfied
        if getattr(request, other):
            yield Violation(other, f"`{other}` must not be given with `{field}`")


def _choice_violations(field: str, texts: Sequence[str]) -> Iterator[Violation]:
    if not texts:
        yield Violation(field, f"`{field}` must have at least one text")
    yield from string_violations(field, texts, MAX_CHOICE_TEXTS, MAX_CHOICE_TEXT_LENGTH)
    if (size := sum(len(text.encode()) for text in texts)) > MAX_CONSTRAINT_BYTES:
        yield violation(field, f"be at most {MAX_CONSTRAINT_BYTES} bytes in total", size)


_REPETITION = re.compile(r"\{([0-9]+)(?:,([0-9]*))?\}")


def _specification_violations(field: str, kind: str, text: str) -> Iterator[Violation]:
    if not 1 <= len(text.encode()) <= MAX_CONSTRAINT_BYTES:
        yield violation(field, f"be 1 to {MAX_CONSTRAINT_BYTES} bytes long", len(text.encode()))
        return
    if kind in ("json", "structural_tag"):  # resolves escapes, which could hide a count
        try:
            text = json.dumps(json.loads(text), ensure_ascii=False)
        except (ValueError, RecursionError):
            yield Violation(field, f"`{field}` must be a JSON document without deep nesting or huge numbers")
            return
    counts = [count for match in _REPETITION.findall("".join(text.split())) for count in match if count]
    is_huge = any(len(count) >= 10 for count in counts)
    if is_huge or sum(map(int, counts)) > MAX_REPETITIONS:
        rule = f"have counted repetitions ({{m,n}}) of at most {MAX_REPETITIONS} in total"
        yield violation(field, rule, "more" if is_huge else sum(map(int, counts)))
