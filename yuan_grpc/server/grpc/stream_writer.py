"""Writing of stream messages such that a call can be ended at any time."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc

from yuan_grpc.server.grpc.request_id import send_headers

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]


class StreamWriter:
    """A writer that sends a call's headers before its first message instead of together with it.

    grpcio marks headers as sent only after the first message is sent. If that write is cancelled, grpcio sends them
    again with the status, and the call hangs until its deadline. The headers still wait for the first message: a call
    rejected before has none, so clients may retry it transparently.

    Args:
        context: the context of the call.
        request_id: returns the id of the request, which the headers get.
    """

    def __init__(self, context: "Context", request_id: Callable[[], str]) -> None:
        self._context = context
        self._request_id = request_id
        self._headers: asyncio.Future[None] | None = None

    async def write(self, message: Any) -> None:
        """Write a message; return when gRPC has accepted it.

        Raises:
            asyncio.CancelledError: the client has disconnected, including when grpcio only notices it on this write.
        """
        if self._headers is None:
            self._headers = asyncio.ensure_future(send_headers(self._context, self._request_id()))
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
