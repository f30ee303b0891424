"""One real engine and one real server for the whole session."""

import asyncio
import sys
import warnings
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
import torch
from adapters import write_adapter
from safetensors.torch import load_file

from yuan_grpc.model.tokenizer import YuanTokenizer
from yuan_grpc.server.core.generation_service import GenerationService
from yuan_grpc.server.engine.vllm import env
from yuan_grpc.server.grpc.health import Health
from yuan_grpc.server.grpc.servicer import NAME, YuanService
from yuan_grpc.server.server import create_server
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
    "--enable-lora",
    "--max-lora-rank=8",
    "--max-cpu-loras=2",
)
ADAPTERS = ("code", "poems", "stories")
"""More than there is room for. There is another, `broken`, that fits no model."""


@dataclass
class Served:
    """A running server, and ways to see into its engine."""

    address: str
    demo: Path
    lora_folder: Path
    stub: yuan_pb2_grpc.YuanServiceStub
    tokenizer: YuanTokenizer
    engine: Any

    @property
    def llm(self) -> Any:
        """vLLM's own engine."""
        return self.engine._llm

    async def generate(self, request: pb.GenerateRequest) -> pb.GenerateResponse:
        """The answer of Generate."""
        response: pb.GenerateResponse = await self.stub.Generate(request)
        return response

    async def stream(self, request: pb.GenerateRequest) -> list[pb.GenerateStreamResponse]:
        """All parts of GenerateStream."""
        return [part async for part in self.stub.GenerateStream(request)]

    async def is_empty(self) -> bool:
        """Whether no request holds a block of the engine's cache, which it refuses to empty otherwise."""
        emptied: bool = await self.llm.reset_prefix_cache()
        return emptied

    async def until_empty(self) -> None:
        """Returns when no request holds a block of the engine's cache; the test's timeout is the limit."""
        while not await self.is_empty():
            pass

    async def until_unfinished(self, requests: int) -> None:
        """Returns when the engine's front end knows of so many requests; the test's timeout is the limit."""
        while self.unfinished != requests:  # noqa: ASYNC110 - vLLM has no event for it
            await asyncio.sleep(0)

    @property
    def unfinished(self) -> int:
        """How many requests the engine's front end knows of."""
        count: int = self.llm.get_num_unfinished_requests()
        return count


@pytest_asyncio.fixture(loop_scope="session")
async def served(session_server: Served) -> Served:
    """The session's server with no adapter loaded: whatever the test before loaded is gone."""
    for lora in (await session_server.stub.ListLoras(pb.ListLorasRequest())).loras:
        await session_server.stub.UnloadLora(pb.UnloadLoraRequest(name=lora.name))
    return session_server


@pytest_asyncio.fixture(loop_scope="session")
async def address(served: Served) -> AsyncIterator[str]:
    """The address of a server whose health is good, on the session's engine."""
    health = Health(NAME)
    server, port = await create_server(YuanService(GenerationService(served.engine)), health, "127.0.0.1:0")
    await server.start()
    await health.set_serving()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def session_server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """The demo model on vLLM, behind the real server on a free port."""
    env.set_defaults()
    lora_folder = tmp_path_factory.mktemp("adapters")
    weights = load_file(Path(DEMO) / "model.safetensors")
    for seed, name in enumerate(ADAPTERS):
        write_adapter(lora_folder / name, weights, ["v_proj", "up_proj"], seed=seed)
    write_adapter(lora_folder / "broken", {"lm_head.weight": torch.zeros(8, 8)}, ["lm_head"])
    settings = Settings(model=DEMO, host="127.0.0.1", port=0, grace_seconds=0, engine_flags=FLAGS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of vLLM's and torch's own, while they import each other
        from yuan_grpc.server.engine.vllm.args import parse_engine_flags
        from yuan_grpc.server.engine.vllm.engine import VllmEngine

        engine = VllmEngine(parse_engine_flags(settings.vllm_flags), lora_folder)
        await engine.start()
    server, port = await create_server(YuanService(GenerationService(engine)), Health(NAME), "127.0.0.1:0")
    try:
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = yuan_pb2_grpc.YuanServiceStub(channel)
            yield Served(
                f"127.0.0.1:{port}", Path(DEMO), lora_folder, stub, YuanTokenizer.from_pretrained(DEMO), engine
            )
        await server.stop(None)
    finally:
        engine.stop()


@pytest.fixture
def buf() -> str:
    """The `buf` beside this Python, grpcurl's stand-in."""
    return str(Path(sys.executable).with_name("buf"))


@pytest.fixture(scope="session")
def tokens(demo: Path) -> int:
    """How many ids are tokens' and not padding."""
    return len(YuanTokenizer.from_pretrained(demo))
