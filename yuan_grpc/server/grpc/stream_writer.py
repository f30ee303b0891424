"""Writing of stream messages such that a call can be ended at any time."""

import asyncio
from typing import TYPE_CHECKING, Any

import grpc

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]


class StreamWriter:
    """A writer that sends a call's headers before its first message instead of together with it.

    grpcio marks headers as sent only after the first message is sent. If that write is cancelled, grpcio sends them
    again with the status, and the call hangs until its deadline. The headers still wait for the first message: a call
    rejected before has none, so clients may retry it transparently.
    """

    def __init__(self, context: "Context") -> None:
        self._context = context
        self._headers: asyncio.Future[None] | None = None

    async def write(self, message: Any) -> None:
        """Write a message; return when gRPC has accepted it.

        Raises:
            asyncio.CancelledError: the client has disconnected, including when grpcio only notices it on this write.
        """
        if self._headers is None:
            self._headers = asyncio.ensure_future(self._context.send_initial_metadata(()))
        if not self._headers.done():
            await self._wait_for_headers(self._headers)
        try:
            await self._context.write(message)
        except grpc.aio.InternalError as error:
            raise asyncio.CancelledError from error

    async def _wait_for_headers(self, headers: "asyncio.Future[None]") -> None:
        try:
            await asyncio.shield(headers)
        except asyncio.CancelledError:
            await asyncio.wait([headers])
            raise
