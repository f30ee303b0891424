"""A server process with a fake engine, for tests of signals, floods and logs, and for `tests/chaos`.

Run as a program: `fake_server.py PORT OPTIONS`, where OPTIONS is a JSON object with the attributes of `Options`.
"""

import argparse
import asyncio
import json
import logging
import os
import resource
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import grpc
from fake_engine import INFO, FakeEngine, last, more
from grpc_health.v1 import health_pb2, health_pb2_grpc

from yuan_grpc.server import log_queue, server, signals
from yuan_grpc.server.engine.types import EngineRequest, StepOutput
from yuan_grpc.server.settings import Settings, add_options, read


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
        arguments: options of `yuan-grpc serve`.
        files: maximum number of open files; 0 for the limit of this process.
        text: the text of each token.
        max_num_seqs: number of sequences that the engine computes at a time.
    """

    tokens: int = 1
    token_seconds: float = 0.0
    limit: int | None = None
    grace_seconds: float = 30.0
    tokenize_seconds: float = 0.0
    log_texts: int = log_queue.MAX_TEXTS
    lame_duck_seconds: int = server.LAME_DUCK_SECONDS
    arguments: tuple[str, ...] = ()
    files: int = 0
    text: str = "a"
    max_num_seqs: int = INFO.max_num_seqs


class PacedEngine(FakeEngine):
    """An engine that yields tokens at a steady rate."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.may_start.set()
        seqs = options.max_num_seqs
        self.info = replace(self.info, max_num_queued_reqs=options.limit, max_token_characters=1, max_num_seqs=seqs)
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
            yield more(self._options.text)
        await asyncio.sleep(self._options.token_seconds)
        yield last()


@contextmanager
def fake_server(
    port: int, options: Options, credentials: grpc.ChannelCredentials | None = None, **popen: Any
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a server process, yield it when it is serving, and kill it in the end.

    Args:
        credentials: credentials of a client, if the server has TLS.
        popen: arguments of `subprocess.Popen`.
    """
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, __file__, str(port), json.dumps(asdict(options))]
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, **popen) as process:
        try:
            wait_until_serving(port, credentials)
            yield process
        finally:
            process.kill()


def wait_until_serving(port: int, credentials: grpc.ChannelCredentials | None = None) -> None:
    """Return when the server on a port reports SERVING."""
    address = f"127.0.0.1:{port}"
    with grpc.secure_channel(address, credentials) if credentials else grpc.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        for response in stub.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True):
            if response.status == health_pb2.HealthCheckResponse.SERVING:
                return


def parse(arguments: Sequence[str]) -> Settings:
    """Return the settings of options, without those in the environment."""
    parser = argparse.ArgumentParser()
    add_options(parser, {})
    return read(parser.parse_args(arguments), ())


def main() -> int:
    """Serve until a stop signal, with the same log as `yuan-grpc serve`."""
    options = Options(**json.loads(sys.argv[2]))
    log_queue.MAX_TEXTS, server.LAME_DUCK_SECONDS = options.log_texts, options.lame_duck_seconds
    log_queue.install()
    signals.exit_on_stop_signals()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    if options.files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (options.files, options.files))
    settings = replace(parse(options.arguments), port=int(sys.argv[1]), grace_seconds=options.grace_seconds)
    return asyncio.run(server.serve(settings, PacedEngine(options)))


if __name__ == "__main__":
    sys.exit(main())
