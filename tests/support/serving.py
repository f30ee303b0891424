"""The real service on a real port, with an engine by hand."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fake_engine import FakeEngine

from yuan_grpc.server.core.generation_service import GenerationService
from yuan_grpc.server.grpc.health import Health
from yuan_grpc.server.grpc.servicer import NAME, YuanService
from yuan_grpc.server.server import create_server


@asynccontextmanager
async def served(engine: FakeEngine, health: Health | None = None) -> AsyncIterator[str]:
    """The address of a server of this engine's."""
    server, port = await create_server(YuanService(GenerationService(engine)), health or Health(NAME), "127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)
