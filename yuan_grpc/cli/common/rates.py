"""Times and rates of a streamed reply."""

from __future__ import annotations

import time
from collections.abc import Callable

from yuan_grpc.client import Completion


class ReplyTimer:
    """The times of a reply, from its creation on.

    Args:
        clock: source of the time, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start = clock()
        self._first: float | None = None

    def record_text(self) -> None:
        """Record the arrival of text."""
        if self._first is None:
            self._first = self._clock()

    def format_summary(self, completion: Completion) -> str:
        """Return the finish reason, the number of tokens and their rate as one line."""
        reason = completion.choices[0].finish_reason if completion.choices else None
        tokens = completion.usage.completion_tokens
        return f"[{reason}, {tokens} tokens, {tokens / max(self._clock() - self._start, 1e-9):.1f} tokens/s]"

    def format_rates(self, completion: Completion) -> str:
        """Return the token counts, the times and the rate after the first text, one on each line."""
        end, usage = self._clock(), completion.usage
        reason = completion.choices[0].finish_reason if completion.choices else None
        rows = [
            ("prompt", f"{usage.prompt_tokens} tokens, {usage.cached_tokens} of them cached"),
            ("reply", f"{usage.completion_tokens} tokens, finish reason {reason}"),
            ("first token", "-" if self._first is None else f"{(self._first - self._start) * 1000:.0f} ms"),
            ("rate", self._format_rate(usage.completion_tokens, end)),
            ("total", f"{end - self._start:.2f} s"),
        ]
        return "\n".join(f"{name + ':':<14}{value}" for name, value in rows)

    def _format_rate(self, tokens: int, end: float) -> str:
        if self._first is None or tokens < 2 or end <= self._first:
            return "-"
        return f"{(tokens - 1) / (end - self._first):.1f} tokens/s"
