"""channelz, the gRPC connections and calls of this process, on a port of its own on loopback."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from yuan_grpc.server.grpc import reflection, unknown_methods
from yuan_grpc.server.start_error import StartError

logger = logging.getLogger(__name__)

NAME = "grpc.channelz.v1.Channelz"


@asynccontextmanager
async def serve(port: int | None) -> AsyncIterator[int]:
    """Serve channelz during the block; yield the port, or 0 if it is disabled.

    Args:
        port: the port, or 0 for any free port; None to disable it.

    Raises:
        StartError: the port is in use, or the package is missing.
    """
    if port is None:
        yield 0
        return
    try:
        from grpc_channelz.v1 import channelz
    except ModuleNotFoundError:
        raise StartError(
            "--channelz-port needs the package grpcio-channelz: pip install 'yuan-grpc[channelz]'"
        ) from None
    server = unknown_methods.create_server([], [("grpc.so_reuseport", 0)])
    channelz.add_channelz_servicer(server)
    reflection.attach(server, [NAME])
    try:
        bound = server.add_insecure_port(f"127.0.0.1:{port}")
    except RuntimeError:
        raise StartError(f"cannot listen on 127.0.0.1:{port}: choose another with --channelz-port") from None
    await server.start()
    logger.info("channelz listening on port %d of 127.0.0.1", bound)
    try:
        yield bound
    finally:
        await server.stop(None)
