"""The running calls, by connection and request id, and their cancellation."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from yuan_grpc.server.errors import (
    AbortedError,
    DuplicateRequestError,
    OverloadedError,
    RequestNotFoundError,
    ServerStoppingError,
    ServiceError,
)

ANY_CONNECTION = ""
"""The connection of a call whose id the server generated: only its caller knows it, so it is valid on all of them."""


@dataclass(eq=False)
class _Call:
    task: "asyncio.Task[Any]"
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    error: ServiceError | None = None

    def end(self, error: ServiceError) -> None:
        """Cancel the call, which then raises the error."""
        if self.error is None:
            self.error = error
            self.task.cancel()


class InflightRequests:
    """Tracks running calls by id, unique on a connection; calls without an id are only counted."""

    def __init__(self) -> None:
        self._by_id: dict[tuple[str, str], _Call] = {}
        self._calls: set[_Call] = set()
        self._count = 0
        self._sequences = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_stopping = False
        self._last_refusal = float("-inf")

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
    def admit(self, sequences: int, limit: int | None) -> Iterator[None]:
        """Count the sequences of a call as running.

        Raises:
            OverloadedError: more than `limit` sequences would be running.
            ServerStoppingError: the server is stopping.
        """
        if self._is_stopping:
            self._last_refusal = asyncio.get_running_loop().time()
            raise ServerStoppingError
        if limit is not None:
            sequences = min(sequences, limit)  # a request that is always too large fails validation
            if self._sequences + sequences > limit:
                raise OverloadedError(f"the request queue is full (limit {limit})")
        self._sequences += sequences
        try:
            yield
        finally:
            self._sequences -= sequences

    @contextmanager
    def track(self, request_id: str, connection: str | None = ANY_CONNECTION) -> Iterator[None]:
        """Track the current task as a call that `abort` and `end_all` can cancel.

        Args:
            connection: the connection on which the id refers to this call; None if it refers to it nowhere.

        Raises:
            DuplicateRequestError: a running call of the connection has this id.
            AbortedError: `abort` cancelled the call.
            ServerStoppingError: `end_all` cancelled the call.
        """
        task = asyncio.current_task()
        assert task is not None
        call = _Call(task)
        with self.track_unnamed(), self._named(call, request_id, connection):
            self._calls.add(call)
            try:
                yield
            except asyncio.CancelledError:
                if call.error is None or task.uncancel() > 0:  # the client may have disconnected at the same time
                    raise
                raise call.error from None
            finally:
                self._calls.discard(call)
                call.ended.set()

    @contextmanager
    def _named(self, call: _Call, request_id: str, connection: str | None) -> Iterator[None]:
        if connection is None:
            yield
            return
        if (connection, request_id) in self._by_id:
            raise DuplicateRequestError(f"`request_id` must not be the id of a running call: {request_id:.256}")
        self._by_id[connection, request_id] = call
        try:
            yield
        finally:
            del self._by_id[connection, request_id]

    async def abort(self, request_id: str, connection: str = ANY_CONNECTION) -> None:
        """Cancel a call, and return when it has freed its resources.

        Raises:
            RequestNotFoundError: no running call of the connection has this id.
        """
        call = self._by_id.get((connection, request_id)) or self._by_id.get((ANY_CONNECTION, request_id))
        if call is None:
            raise RequestNotFoundError(
                f"`request_id` must be the id of a running call of this connection, not {request_id:.256}"
            )
        call.end(AbortedError("the call was ended by Abort"))
        await call.ended.wait()

    def stop_admitting(self) -> None:
        """Refuse new calls from now on."""
        self._is_stopping = True

    def end_all(self) -> None:
        """Cancel all tracked calls, because the server stops."""
        for call in self._calls:
            call.end(ServerStoppingError())

    @property
    def count(self) -> int:
        """Number of running calls."""
        return self._count

    @property
    def seconds_since_refusal(self) -> float:
        """Seconds since a call was refused because the server is stopping; infinite if none was."""
        return asyncio.get_running_loop().time() - self._last_refusal

    async def wait_idle(self) -> None:
        """Wait until no call is running and every one has freed its resources."""
        await self._idle.wait()
