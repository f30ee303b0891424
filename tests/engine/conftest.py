"""One real engine and one real server for the whole session."""

import sys
import warnings
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from yuan_grpc.__main__ import set_engine_defaults
from yuan_grpc.model.tokenizer import YuanTokenizer
from yuan_grpc.server.health import Health
from yuan_grpc.server.serve import build
from yuan_grpc.server.service import NAME, YuanService
from yuan_grpc.server.settings import DEMO, Settings
from yuan_grpc.v1 import yuan_pb2 as pb
from yuan_grpc.v1 import yuan_pb2_grpc

# Two sequences at a time, so that a third one waits, and a queue with an end; small steps, so that a long prompt takes
# many.
FLAGS = (
    "--dtype=float32",
    "--max-num-seqs=2",
    "--max-num-queued-reqs=150",
    "--max-num-batched-tokens=48",
    "--block-size=32",
)


@dataclass
class Served:
    """A running server, and ways to see into its engine."""

    address: str
    stub: yuan_pb2_grpc.YuanServiceStub
    tokenizer: YuanTokenizer
    llm: object

    async def generate(self, request: pb.GenerateRequest) -> pb.GenerateResponse:
        """The answer of Generate."""
        response: pb.GenerateResponse = await self.stub.Generate(request)
        return response

    async def stream(self, request: pb.GenerateRequest) -> list[pb.GenerateStreamResponse]:
        """All parts of GenerateStream."""
        return [part async for part in self.stub.GenerateStream(request)]

    async def is_empty(self) -> bool:
        """Whether no request holds a block of the engine's cache, which it refuses to empty otherwise."""
        emptied: bool = await self.llm.reset_prefix_cache()  # type: ignore[attr-defined]
        return emptied

    @property
    def unfinished(self) -> int:
        """How many requests the engine's front end knows of."""
        count: int = self.llm.get_num_unfinished_requests()  # type: ignore[attr-defined]
        return count


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def served() -> AsyncIterator[Served]:
    """The demo model on vLLM, behind the real server on a free port."""
    set_engine_defaults()
    settings = Settings(model=DEMO, host="127.0.0.1", port=0, grace_seconds=0, engine_flags=FLAGS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of vLLM's and torch's own, while they import each other
        from yuan_grpc.server.engine import VllmEngine, read_engine_flags

        engine = VllmEngine(read_engine_flags(settings.vllm_flags))
        await engine.start()
    server, port = await build(YuanService(engine), Health(NAME), "127.0.0.1:0")
    try:
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = yuan_pb2_grpc.YuanServiceStub(channel)
            yield Served(f"127.0.0.1:{port}", stub, YuanTokenizer.from_pretrained(DEMO), engine._llm)
        await server.stop(None)
    finally:
        engine.stop()


@pytest.fixture
def buf() -> str:
    """The `buf` beside this Python, grpcurl's stand-in."""
    return str(Path(sys.executable).with_name("buf"))
