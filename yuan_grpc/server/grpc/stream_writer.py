"""A stream's messages, written so that the call can be ended at any time."""

import asyncio
from typing import TYPE_CHECKING, Any

import grpc

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]


class StreamWriter:
    """Sends a call's headers before its first message, not with it.

    grpcio takes headers for sent only when the first message is; where that write is cancelled it sends them once more
    with the status, and the call hangs until its deadline. They wait for the first message all the same: a call that is
    refused before has none, so that clients may try it again by themselves.
    """

    def __init__(self, context: "Context") -> None:
        self._context = context
        self._opening: asyncio.Future[None] | None = None

    async def write(self, message: Any) -> None:
        """Returns when gRPC has taken the message. A caller who has gone ends the task, as if gRPC had known before."""
        if self._opening is None:
            self._opening = asyncio.ensure_future(self._context.send_initial_metadata(()))
        if not self._opening.done():
            await self._opened(self._opening)
        try:
            await self._context.write(message)
        except grpc.aio.InternalError as error:
            raise asyncio.CancelledError from error

    async def _opened(self, opening: "asyncio.Future[None]") -> None:
        try:
            await asyncio.shield(opening)
        except asyncio.CancelledError:
            await asyncio.wait([opening])
            raise
