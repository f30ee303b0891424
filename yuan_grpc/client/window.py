"""A bounded window over the requests of `generate_many`: running ones plus results not yet read."""

from __future__ import annotations

from collections import deque

from yuan_grpc.client.types import Result


class Window:
    """A counter of running requests and a buffer of unread results, at most `size` in total."""

    def __init__(self, size: int, *, ordered: bool) -> None:
        self._size = size
        self._ordered = ordered
        self._num_started = 0
        self._num_popped = 0
        self._results: dict[int, Result] = {}
        self._finish_order: deque[int] = deque()

    @property
    def has_capacity(self) -> bool:
        """Whether another request may start."""
        return self._num_started - self._num_popped < self._size

    @property
    def is_empty(self) -> bool:
        """Whether no request runs and no result waits."""
        return self._num_started == self._num_popped

    @property
    def is_ready(self) -> bool:
        """Whether the next result is available."""
        return self._num_popped in self._results if self._ordered else bool(self._results)

    def start(self) -> int:
        """Register a new request and return its index."""
        self._num_started += 1
        return self._num_started - 1

    def finish(self, result: Result) -> None:
        """Store the result of a request."""
        self._results[result.index] = result
        self._finish_order.append(result.index)

    def pop(self) -> Result:
        """Remove and return the next result."""
        index = self._num_popped if self._ordered else self._finish_order.popleft()
        self._num_popped += 1
        return self._results.pop(index)
