"""An engine in the caller's process, used through the client API without a server.

    from yuan_grpc import offline

    if __name__ == "__main__":  # vLLM starts processes that import this script
        with offline.load("/models/Yuan2-2B", "--dtype=bfloat16") as yuan:
            print(yuan.generate("世界上最高的山是什么", max_tokens=32).text)

Requires `yuan-grpc[cpu]` or `yuan-grpc[cuda]`.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any, TypeVar

import grpc

from yuan_grpc.client import Client
from yuan_grpc.server.core.generation_service import GenerationService
from yuan_grpc.server.engine.protocol import Engine
from yuan_grpc.server.engine.vllm import env
from yuan_grpc.server.grpc.health import Health
from yuan_grpc.server.grpc.servicer import NAME, YuanService
from yuan_grpc.server.server import create_server
from yuan_grpc.server.settings import DEMO, Settings

Result = TypeVar("Result")


@contextmanager
def load(model: str = DEMO, *engine_flags: str, lora_folder: Path | None = None) -> Iterator[Client]:
    """Load a model and yield a client for it. The engine stops when the block ends.

    Args:
        model: a checkpoint folder or a Hugging Face Hub ID; the embedded demo by default.
        engine_flags: vLLM's flags, as for `yuan-grpc serve`.
        lora_folder: the folder of the LoRA adapters that can be loaded; None for none.

    Raises:
        ModuleNotFoundError: vLLM is not installed.
        ValueError, OSError, StartError: the model cannot be served, or a flag is invalid.
    """
    with serve_model(model, *engine_flags, lora_folder=lora_folder) as target, Client(target) as client:
        yield client


@contextmanager
def serve_model(model: str, *engine_flags: str, lora_folder: Path | None = None) -> Iterator[str]:
    """Load a model and yield the gRPC target for clients; see `load`."""
    env.set_defaults()
    from yuan_grpc.server.engine.vllm.args import parse_engine_flags
    from yuan_grpc.server.engine.vllm.engine import VllmEngine

    settings = Settings(model, "", 0, 0, engine_flags, lora_folder)
    with serve_engine(VllmEngine(parse_engine_flags(settings.vllm_flags), lora_folder)) as target:
        yield target


@contextmanager
def serve_engine(engine: Engine) -> Iterator[str]:
    """Start an engine and its gRPC service in a thread, and yield the gRPC target. Stop both when the block ends.

    The service listens on a unix socket in a private folder, so results, limits and errors equal a server's.
    """
    with TemporaryDirectory(prefix=env.PREFIX, dir=env.socket_parent()) as folder, _background_loop() as run:
        target = f"unix:{folder}/socket"
        health = Health(NAME)
        server, _ = run(create_server(YuanService(GenerationService(engine)), health, target))
        try:
            run(engine.start())
            run(server.start())
            run(health.set_serving())
            yield target
        finally:
            run(_stop(server, engine))


@contextmanager
def _background_loop() -> Iterator[Callable[[Coroutine[Any, Any, Result]], Result]]:
    """Start an event loop in a thread. Yield a function that runs a coroutine there and returns its result."""
    loop = asyncio.new_event_loop()
    thread = Thread(target=loop.run_forever, name="yuan-grpc")
    thread.start()
    try:
        yield lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _stop(server: grpc.aio.Server, engine: Engine) -> None:
    await server.stop(None)
    engine.stop()
