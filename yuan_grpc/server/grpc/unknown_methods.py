"""Calls of methods that no service has: they end with UNIMPLEMENTED, whatever bytes they name.

grpcio's asyncio server (1.85) decodes such a name in the loop that takes all calls, and one that is not UTF-8 ends it
for everybody. Methods that are registered, as those of all our services are, never come that way. So the others are
taken here, and nobody reads what they are called.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]

_NEEDED = ("_request_call", "_make_request_call_future"), ("_MethodResolver", "_handle_rpc", "_schedule_rpc_coro")
"""Of grpcio's own server, and of the module that it is in; where one is missing, its server is taken as it is."""


class _Server(cygrpc.AioServer):  # type: ignore[misc]
    """grpcio's, but for what it does with calls of unknown methods."""

    def _make_request_call_future(self, method: bytes | None) -> "asyncio.Future[Any]":
        if method is not None:
            future: asyncio.Future[Any] = super()._make_request_call_future(method)
            return future
        return asyncio.ensure_future(self._refuse())

    async def _refuse(self) -> None:
        """Never returns; raises what waiting for a call raises, as it does when the server stops."""
        loop, nothing, refusals = asyncio.get_running_loop(), cygrpc._MethodResolver([], {}), set[asyncio.Task[None]]()
        while True:
            call = await self._request_call()
            refusal = cygrpc._handle_rpc("", nothing, (), call, loop, False)
            task = loop.create_task(cygrpc._schedule_rpc_coro(refusal, call, loop, ""))
            refusals.add(task)
            task.add_done_callback(refusals.discard)


def server(interceptors: Sequence[grpc.aio.ServerInterceptor], options: Sequence[tuple[str, Any]]) -> grpc.aio.Server:
    """A server of `grpc.aio`'s that outlives calls of any name. Its services' methods must be registered."""
    own, module = _NEEDED
    plain = cygrpc.AioServer
    if all(hasattr(plain, name) for name in own) and all(hasattr(cygrpc, name) for name in module):
        cygrpc.AioServer = _Server  # which grpcio has no other way to be given
    try:
        return grpc.aio.server(interceptors=interceptors, options=options)
    finally:
        cygrpc.AioServer = plain
