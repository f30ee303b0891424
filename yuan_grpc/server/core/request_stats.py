"""The tokens and times of one request, measured while it runs."""

from bisect import bisect_left
from time import monotonic

from yuan_grpc.server.engine.types import StepOutput

GAP_BOUNDS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Upper bounds of the classes that the times between two messages are counted in, in seconds."""


class RequestStats:
    """The tokens and times of one request. Times are in seconds.

    Attributes:
        model: the name of the model or adapter that generates; empty until the prompt is accepted.
        prompt_tokens, completion_tokens: numbers of tokens so far.
        turn_seconds: time that the request waited for its turn, before the engine got it.
        queue_seconds: time that the request waited for its turn and in the engine; None if unknown.
        prefill_seconds: time from then to the first token; None if unknown.
        first_token_seconds: time from the arrival of the request to its first token; None before it.
        messages: number of outputs with tokens, if the response is streamed.
        coalesced: number of those with several tokens of a choice.
        gaps: number of times between two messages in each class of `GAP_BOUNDS`, and above the last one.
        gap_seconds: sum of these times.

    Args:
        stream: whether the response is streamed.
    """

    def __init__(self, *, stream: bool = False) -> None:
        self.model = ""
        self.prompt_tokens = self.completion_tokens = 0
        self.turn_seconds = 0.0
        self.queue_seconds: float | None = None
        self.prefill_seconds: float | None = None
        self.first_token_seconds: float | None = None
        self.messages = self.coalesced = 0
        self.gaps = [0] * (len(GAP_BOUNDS) + 1)
        self.gap_seconds = 0.0
        self._is_stream = stream
        self._start = self._accepted = self._last_output = monotonic()

    def observe(self, output: StepOutput) -> None:
        """Record an output of the engine or of a strategy."""
        now, deltas, is_first = monotonic(), output.deltas, self.first_token_seconds is None
        if not deltas and output.progress is None and output.first_token_seconds is None:
            if is_first:
                self._accepted = now
            return
        tokens = output.discarded_tokens
        for delta in deltas:
            tokens += len(delta.token_ids)
        self.completion_tokens += tokens
        if is_first:
            self._observe_first(output, now)
        if self._is_stream and tokens:
            self.messages += 1
            self.coalesced += tokens > len(deltas)
            if not is_first:
                gap = now - self._last_output
                self.gaps[bisect_left(GAP_BOUNDS, gap)] += 1
                self.gap_seconds += gap
        self._last_output = now

    def _observe_first(self, output: StepOutput, now: float) -> None:
        self.prefill_seconds = output.prefill_seconds
        if output.queue_seconds is not None:
            self.queue_seconds = self.turn_seconds + output.queue_seconds
        if output.first_token_seconds is None:
            self.first_token_seconds = now - self._start
        else:
            self.first_token_seconds = self._accepted - self._start + output.first_token_seconds

    @property
    def total_seconds(self) -> float:
        """Time from the arrival of the request to its last output so far."""
        return self._last_output - self._start

    @property
    def decode_seconds(self) -> float | None:
        """Time from the first token to the last output so far; None before the first token."""
        return None if self.first_token_seconds is None else max(0.0, self.total_seconds - self.first_token_seconds)
