"""The calls that run: their names, and how they are ended."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from yuan_grpc.server.errors import AbortedError, DuplicateRequestError, RequestNotFoundError


@dataclass
class _Call:
    task: "asyncio.Task[Any]"
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    aborted: bool = False


class InflightRequests:
    """Knows every running call by its request id, which no two share."""

    def __init__(self) -> None:
        self._running: dict[str, _Call] = {}
        self._open = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def track_unnamed(self) -> Iterator[None]:
        """Counts a call as running, though it has no name."""
        self._open += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:
                self._idle.set()

    @contextmanager
    def track(self, request_id: str) -> Iterator[None]:
        """Holds a name for the current task, which `abort` can end from outside.

        Raises:
            DuplicateRequestError: the name is taken.
            AbortedError: it was ended.
        """
        if request_id in self._running:
            raise DuplicateRequestError(f"`request_id` must not be that of a call still running: {request_id:.256}")
        task = asyncio.current_task()
        assert task is not None
        call = self._running[request_id] = _Call(task)
        try:
            with self.track_unnamed():
                yield
        except asyncio.CancelledError:
            if not call.aborted or task.uncancel() > 0:  # the caller may have gone at the same time
                raise
            raise AbortedError("the call was ended by Abort") from None
        finally:
            del self._running[request_id]
            call.ended.set()

    async def abort(self, request_id: str) -> None:
        """Ends a call, and returns when it has freed what it held.

        Raises:
            RequestNotFoundError: no running call has this name.
        """
        call = self._running.get(request_id)
        if call is None:
            raise RequestNotFoundError(f"`request_id` must be that of a running call, not {request_id:.256}")
        if not call.aborted:
            call.aborted = True
            call.task.cancel()
        await call.ended.wait()

    async def wait_idle(self) -> None:
        """Returns when no call is running, and every one that ran has freed its request."""
        await self._idle.wait()
