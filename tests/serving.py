"""The real service on a real port, with an engine by hand."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fakes import FakeEngine

from yuan_grpc.server.answers import Answers
from yuan_grpc.server.health import Health
from yuan_grpc.server.serve import build
from yuan_grpc.server.service import NAME, YuanService


@asynccontextmanager
async def served(engine: FakeEngine, health: Health | None = None) -> AsyncIterator[str]:
    """The address of a server of this engine's."""
    server, port = await build(YuanService(Answers(engine)), health or Health(NAME), "127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)
