"""The running calls, by request id, and their cancellation."""

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
    is_aborted: bool = False


class InflightRequests:
    """Tracks running calls: by request id, which is unique among them, or only by their number."""

    def __init__(self) -> None:
        self._by_id: dict[str, _Call] = {}
        self._count = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def track_unnamed(self) -> Iterator[None]:
        """Count a call without a request id as running."""
        self._count += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._count -= 1
            if not self._count:
                self._idle.set()

    @contextmanager
    def track(self, request_id: str) -> Iterator[None]:
        """Track the current task as a call that `abort` can cancel.

        Raises:
            DuplicateRequestError: a running call has this id.
            AbortedError: `abort` cancelled the call.
        """
        if request_id in self._by_id:
            raise DuplicateRequestError(f"`request_id` must not be the id of a running call: {request_id:.256}")
        task = asyncio.current_task()
        assert task is not None
        call = self._by_id[request_id] = _Call(task)
        try:
            with self.track_unnamed():
                yield
        except asyncio.CancelledError:
            if not call.is_aborted or task.uncancel() > 0:  # the client may have disconnected at the same time
                raise
            raise AbortedError("the call was ended by Abort") from None
        finally:
            del self._by_id[request_id]
            call.ended.set()

    async def abort(self, request_id: str) -> None:
        """Cancel a call, and return when it has freed its resources.

        Raises:
            RequestNotFoundError: no running call has this id.
        """
        call = self._by_id.get(request_id)
        if call is None:
            raise RequestNotFoundError(f"`request_id` must be the id of a running call, not {request_id:.256}")
        if not call.is_aborted:
            call.is_aborted = True
            call.task.cancel()
        await call.ended.wait()

    async def wait_idle(self) -> None:
        """Wait until no call is running and every one has freed its resources."""
        await self._idle.wait()
