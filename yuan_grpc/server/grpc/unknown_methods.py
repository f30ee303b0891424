"""A workaround for grpcio: a call whose path is not UTF-8 stops the whole asyncio server.

Why: `AioServer._server_main_loop` of grpcio (still in 1.85.1, `grpc/_cython/_cygrpc/aio/server.pyx.pxi`) decodes the
path of every call to an unregistered method. The `UnicodeDecodeError` ends the loop that accepts all calls. No upstream
issue is known.
How: grpcio decodes no path of a registered method, and all methods of our services are registered. A separate loop
accepts the other calls and rejects them with UNIMPLEMENTED without decoding their paths.
Remove when: `test_grpcio_still_stops_at_a_path_that_is_not_utf_8` in `tests/contract/test_server.py` fails with the
oldest supported grpcio. Then create the server with `grpc.aio.server`.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]

_SERVER_NAMES = ("_request_call", "_make_request_call_future")
"""Private names of `cygrpc.AioServer` that the workaround uses."""
_MODULE_NAMES = ("_MethodResolver", "_handle_rpc", "_schedule_rpc_coro")
"""Private names of `cygrpc` that the workaround uses."""


class _Server(cygrpc.AioServer):  # type: ignore[misc]
    """grpcio's server, with a separate loop for calls to unregistered methods."""

    def _make_request_call_future(self, method: bytes | None) -> "asyncio.Future[Any]":
        if method is not None:
            future: asyncio.Future[Any] = super()._make_request_call_future(method)
            return future
        return asyncio.ensure_future(self._reject_calls())

    async def _reject_calls(self) -> None:
        """Reject calls until waiting for the next one raises, as it does when the server stops. Never returns."""
        loop, no_methods, tasks = asyncio.get_running_loop(), cygrpc._MethodResolver([], {}), set[asyncio.Task[None]]()
        while True:
            call = await self._request_call()
            rejection = cygrpc._handle_rpc("", no_methods, (), call, loop, False)
            task = loop.create_task(cygrpc._schedule_rpc_coro(rejection, call, loop, ""))
            tasks.add(task)
            task.add_done_callback(tasks.discard)


def create_server(
    interceptors: Sequence[grpc.aio.ServerInterceptor], options: Sequence[tuple[str, Any]]
) -> grpc.aio.Server:
    """Return a `grpc.aio` server that survives calls with any path. All methods of its services must be registered.

    If this grpcio lacks one of the private names, the server is grpcio's own, without the workaround.
    """
    original = cygrpc.AioServer
    if all(hasattr(original, name) for name in _SERVER_NAMES) and all(hasattr(cygrpc, name) for name in _MODULE_NAMES):
        cygrpc.AioServer = _Server  # grpcio has no parameter for the server's class
    try:
        return grpc.aio.server(interceptors=interceptors, options=options)
    finally:
        cygrpc.AioServer = original
