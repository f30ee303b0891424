"""The requests that are running, by ID, and their cancellation."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from yuan_grpc.server.errors import AbortedError, DuplicateRequestError, RequestNotFoundError


@dataclass
class _InflightRequest:
    task: "asyncio.Task[Any]"
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    is_aborted: bool = False


class InflightRequests:
    """Tracks running requests by their IDs, which are unique, and waits for all calls to end."""

    def __init__(self) -> None:
        self._by_id: dict[str, _InflightRequest] = {}
        self._count = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def track_unnamed(self) -> Iterator[None]:
        """Count a call without an ID as running."""
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
        """Track the current task as a request that `abort` can cancel.

        Raises:
            DuplicateRequestError: a running request has this ID.
            AbortedError: `abort` cancelled the request.
        """
        if request_id in self._by_id:
            raise DuplicateRequestError(f"`request_id` must not be that of a running request: {request_id:.256}")
        task = asyncio.current_task()
        assert task is not None
        request = self._by_id[request_id] = _InflightRequest(task)
        try:
            with self.track_unnamed():
                yield
        except asyncio.CancelledError:
            if not request.is_aborted or task.uncancel() > 0:  # the client may have disconnected at the same time
                raise
            raise AbortedError("the request was cancelled by Abort") from None
        finally:
            del self._by_id[request_id]
            request.ended.set()

    async def abort(self, request_id: str) -> None:
        """Cancel a request, and return when it has freed its resources.

        Raises:
            RequestNotFoundError: no running request has this ID.
        """
        request = self._by_id.get(request_id)
        if request is None:
            raise RequestNotFoundError(f"`request_id` must be that of a running request, not {request_id:.256}")
        if not request.is_aborted:
            request.is_aborted = True
            request.task.cancel()
        await request.ended.wait()

    async def wait_idle(self) -> None:
        """Wait until no call is running and every one has freed its resources."""
        await self._idle.wait()
