"""The running calls, by owner and request id, and their cancellation."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from yuan_grpc.server.errors import (
    AbortedError,
    DuplicateRequestError,
    RequestNotFoundError,
    ServerStoppingError,
    ServiceError,
)
from yuan_grpc.server.security.identity import current_identity

ANY_CONNECTION = ""
"""The connection of a call whose id the server generated. Only its caller knows it, so all connections accept it."""


def call_owner(connection: str | None) -> str | None:
    """Return the owner of a call's id: the identity of the caller, or else its connection.

    Args:
        connection: None if the id is valid nowhere.
    """
    name = current_identity().name
    return f"name:{name}" if name and connection is not None else connection


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
    """Tracks running calls by their id, which is unique per owner. Calls without an id are only counted.

    Attributes:
        abort_elsewhere: `abort_here` of the other processes that serve the engine, which returns whether one of them
            has the call; None if there are no others.
    """

    def __init__(self) -> None:
        self._by_id: dict[tuple[str, str], _Call] = {}
        self._calls: set[_Call] = set()
        self._count = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_stopping = False
        self._last_refusal = self._last_end = float("-inf")
        self.abort_elsewhere: Callable[[str, str, bool], Awaitable[bool]] | None = None

    @contextmanager
    def track_unnamed(self) -> Iterator[None]:
        """Count a call without a request id as running."""
        self._count += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._count -= 1
            self._last_end = time.monotonic()
            if not self._count:
                self._idle.set()

    def check_admitting(self) -> None:
        """Raise ServerStoppingError if the server is stopping."""
        if self._is_stopping:
            self._last_refusal = time.monotonic()
            raise ServerStoppingError

    @contextmanager
    def track(self, request_id: str, owner: str | None = ANY_CONNECTION) -> Iterator[None]:
        """Track the current task as a call that `abort` and `end_all` can cancel.

        Args:
            owner: the connection or the identity that the id belongs to; None if `abort` does not find it.

        Raises:
            DuplicateRequestError: a running call of the owner has this id.
            AbortedError: `abort` cancelled the call.
            ServerStoppingError: `end_all` cancelled the call.
        """
        task = asyncio.current_task()
        assert task is not None
        call = _Call(task)
        with self.track_unnamed(), self._named(call, request_id, owner):
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
    def _named(self, call: _Call, request_id: str, owner: str | None) -> Iterator[None]:
        if owner is None:
            yield
            return
        if (owner, request_id) in self._by_id:
            raise DuplicateRequestError(f"`request_id` must not be the id of a running call: {request_id:.256}")
        self._by_id[owner, request_id] = call
        try:
            yield
        finally:
            del self._by_id[owner, request_id]

    def is_running(self, request_id: str, owner: str) -> bool:
        """Return whether a running call of the owner has this id."""
        return (owner, request_id) in self._by_id

    async def abort(self, request_id: str, owner: str = ANY_CONNECTION, *, of_all: bool = False) -> None:
        """Cancel a call, and return when it has freed its resources.

        Args:
            owner: the connection or the identity of the caller of `Abort`.
            of_all: whether it may also end the calls of others, if none of its own has this id.

        Raises:
            RequestNotFoundError: no running call of the owner has this id.
        """
        has_ended = await self.abort_here(request_id, owner, of_all=of_all)
        if not has_ended or of_all:
            has_ended |= await self._abort_elsewhere(request_id, owner, of_all)
        if not has_ended:
            raise RequestNotFoundError(
                f"`request_id` must be the id of a running call of this caller, not {request_id:.256}"
            )

    async def abort_here(self, request_id: str, owner: str, *, of_all: bool = False) -> bool:
        """Cancel a call as `abort` does; return False if this process has none."""
        call = self._by_id.get((owner, request_id)) or self._by_id.get((ANY_CONNECTION, request_id))
        calls = [call] if call else [c for (_, id), c in self._by_id.items() if of_all and id == request_id]
        for found in calls:
            found.end(AbortedError("the call was ended by Abort"))
        for found in calls:
            await found.ended.wait()
        return bool(calls)

    async def _abort_elsewhere(self, request_id: str, owner: str, of_all: bool) -> bool:
        return self.abort_elsewhere is not None and await self.abort_elsewhere(request_id, owner, of_all)

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
        return time.monotonic() - self._last_refusal

    @property
    def seconds_since_end(self) -> float:
        """Seconds since the last call ended; infinite if there was none."""
        return time.monotonic() - self._last_end

    async def wait_idle(self) -> None:
        """Wait until no call is running and every one has freed its resources."""
        await self._idle.wait()
