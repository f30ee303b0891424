"""Which of many requests run, and which results wait to be read: never more than so many together."""

from __future__ import annotations

from collections import deque

from yuan_grpc.client.types import Result


class Window:
    """Counts requests that run and keeps results that are not read yet, until it is their turn."""

    def __init__(self, size: int, *, ordered: bool) -> None:
        self._size = size
        self._ordered = ordered
        self._launched = 0
        self._taken = 0
        self._finished: dict[int, Result] = {}
        self._arrivals: deque[int] = deque()

    @property
    def has_room(self) -> bool:
        """Whether another request may start."""
        return self._launched - self._taken < self._size

    @property
    def is_empty(self) -> bool:
        """Whether nothing runs and nothing waits."""
        return self._launched == self._taken

    @property
    def is_ready(self) -> bool:
        """Whether there is a result whose turn it is."""
        return self._taken in self._finished if self._ordered else bool(self._finished)

    def launch(self) -> int:
        """A request starts; returns its index."""
        self._launched += 1
        return self._launched - 1

    def finish(self, result: Result) -> None:
        """A request has ended."""
        self._finished[result.index] = result
        self._arrivals.append(result.index)

    def take(self) -> Result:
        """The result whose turn it is."""
        index = self._taken if self._ordered else self._arrivals.popleft()
        self._taken += 1
        return self._finished.pop(index)
