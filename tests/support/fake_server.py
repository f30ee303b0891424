"""A server process with a fake engine, for tests of signals, floods and logs.

Run as a program: `fake_server.py PORT OPTIONS`, where OPTIONS is a JSON object with the attributes of `Options`.
"""

import asyncio
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import grpc
from fake_engine import FakeEngine, last, more
from grpc_health.v1 import health_pb2, health_pb2_grpc

from yuan_grpc.server import log_queue, server, signals
from yuan_grpc.server.engine.types import EngineRequest, StepOutput
from yuan_grpc.server.settings import DEMO, Settings


@dataclass(frozen=True)
class Options:
    """The engine and the settings of the server.

    Attributes:
        tokens: number of tokens of each choice, one every `token_seconds`.
        limit: maximum running choices; None for no limit.
        grace_seconds: as in `Settings`.
        tokenize_seconds: time to tokenize a character, on the event loop.
        log_texts: number of texts that wait to be written to the log.
        lame_duck_seconds: limit on the time that a stopping server refuses calls.
    """

    tokens: int = 1
    token_seconds: float = 0.0
    limit: int | None = None
    grace_seconds: float = 30.0
    tokenize_seconds: float = 0.0
    log_texts: int = log_queue.MAX_TEXTS
    lame_duck_seconds: int = server.LAME_DUCK_SECONDS


class PacedEngine(FakeEngine):
    """An engine that yields tokens at a steady rate."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.may_start.set()
        self.info = replace(self.info, max_num_queued_reqs=options.limit, max_token_characters=1)
        self._options = options

    async def tokenize(self, text: str) -> list[int]:
        end = time.thread_time() + self._options.tokenize_seconds * len(text)
        while time.thread_time() < end:
            pass
        return await super().tokenize(text)

    async def generate(
        self, request: EngineRequest, *, stream: bool, deadline: asyncio.Event | None = None
    ) -> AsyncGenerator[StepOutput, None]:
        yield StepOutput()
        for _ in range(self._options.tokens - 1):
            await asyncio.sleep(self._options.token_seconds)
            yield more("a")
        await asyncio.sleep(self._options.token_seconds)
        yield last()


@contextmanager
def fake_server(port: int, options: Options, **popen: Any) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a server process, yield it when it is serving, and kill it in the end."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, __file__, str(port), json.dumps(asdict(options))]
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, **popen) as process:
        try:
            wait_until_serving(port)
            yield process
        finally:
            process.kill()


def wait_until_serving(port: int) -> None:
    """Return when the server on a port reports SERVING."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        for response in stub.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True):
            if response.status == health_pb2.HealthCheckResponse.SERVING:
                return


def main() -> int:
    """Serve until a stop signal, with the same log as `yuan-grpc serve`."""
    options = Options(**json.loads(sys.argv[2]))
    log_queue.MAX_TEXTS, server.LAME_DUCK_SECONDS = options.log_texts, options.lame_duck_seconds
    log_queue.install()
    signals.exit_on_stop_signals()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    settings = Settings(DEMO, "127.0.0.1", int(sys.argv[1]), options.grace_seconds, ())
    return asyncio.run(server.serve(settings, PacedEngine(options)))


if __name__ == "__main__":
    sys.exit(main())
