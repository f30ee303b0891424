"""An engine in the caller's own care: the client's calls, and no server to start.

    from yuan_grpc import offline

    if __name__ == "__main__":  # for the engine's processes import the script that starts them
        with offline.load("/models/Yuan2-2B", "--dtype=bfloat16") as yuan:
            print(yuan.generate("世界上最高的山是什么", max_tokens=32).text)

Needs `yuan-grpc[cpu]` or `yuan-grpc[cuda]`.
"""

import asyncio
import os
import tempfile
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

MAX_SOCKET_PATH = 107
"""Bytes, as Linux has it."""


@contextmanager
def load(model: str = DEMO, *engine_flags: str, lora_folder: Path | None = None) -> Iterator[Client]:
    """Starts an engine, which ends with the block, and yields a client of it.

    Args:
        model: a checkpoint's folder, or its id on the Hugging Face hub; the embedded demo unless given.
        engine_flags: vLLM's own, as `yuan-grpc serve` takes them.
        lora_folder: has the adapters that can be loaded; None for none.

    Raises:
        ModuleNotFoundError: vLLM is not installed.
        ValueError, OSError: the model cannot be served, or a flag is wrong.
    """
    with listening(model, *engine_flags, lora_folder=lora_folder) as target, Client(target) as client:
        yield client


@contextmanager
def listening(model: str, *engine_flags: str, lora_folder: Path | None = None) -> Iterator[str]:
    """The same, and yields what clients take for a target."""
    env.set_defaults()
    from yuan_grpc.server.engine.vllm.args import parse_engine_flags
    from yuan_grpc.server.engine.vllm.engine import VllmEngine

    settings = Settings(model, "", 0, 0, engine_flags, lora_folder)
    with running(VllmEngine(parse_engine_flags(settings.vllm_flags), lora_folder)) as target:
        yield target


@contextmanager
def running(engine: Engine) -> Iterator[str]:
    """Has an engine and its service run beside the caller for as long as the block lasts, and yields the target.

    It is a socket in a private folder, behind which is the service itself: answers, limits and errors are a server's.
    """
    with TemporaryDirectory(prefix="yuan-grpc-", dir=_place()) as folder, _loop() as do:
        target = f"unix:{folder}/socket"
        server, _ = do(create_server(YuanService(GenerationService(engine)), Health(NAME), target))
        try:
            do(engine.start())
            do(server.start())
            yield target
        finally:
            do(_stop(server, engine))


def _place() -> str:
    """Where the socket's folder is to be: where temporary files are, unless the path would be too long for a socket."""
    usual = tempfile.gettempdir()
    return usual if len(os.fsencode(f"{usual}/yuan-grpc-12345678/socket")) <= MAX_SOCKET_PATH else "/tmp"


@contextmanager
def _loop() -> Iterator[Callable[[Coroutine[Any, Any, Result]], Result]]:
    """Yields what has a coroutine run in another thread, and returns its result."""
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
