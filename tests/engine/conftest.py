"""Fixtures for one real engine and one real server, shared by the whole session."""

import asyncio
import sys
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
import torch
from adapters import write_adapter
from prometheus_client import REGISTRY
from prometheus_client.registry import Collector
from random_checkpoint import random_checkpoint
from safetensors.torch import load_file

from yuan_grpc.model.tokenizer import YuanTokenizer
from yuan_grpc.server.core.generation_service import GenerationService
from yuan_grpc.server.engine.vllm import env
from yuan_grpc.server.grpc.health import Health
from yuan_grpc.server.grpc.servicer import NAME, YuanService
from yuan_grpc.server.server import create_server
from yuan_grpc.server.settings import DEMO_FLAGS, Settings
from yuan_grpc.v1 import yuan_pb2 as pb
from yuan_grpc.v1 import yuan_pb2_grpc

# At most two sequences run at a time, so that a third one waits. The queue is limited. Small scheduler steps spread a
# long prompt over many of them.
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
"""Loadable LoRA adapters, more than `--max-cpu-loras` allows at once. A further one, `broken`, fits no model."""


@dataclass
class Served:
    """A running server, with access to its engine."""

    address: str
    demo: Path
    lora_folder: Path
    stub: yuan_pb2_grpc.YuanServiceStub
    tokenizer: YuanTokenizer
    engine: Any

    @property
    def llm(self) -> Any:
        """The vLLM engine."""
        return self.engine._llm

    async def generate(self, request: pb.GenerateRequest) -> pb.GenerateResponse:
        """Return the response of Generate."""
        response: pb.GenerateResponse = await self.stub.Generate(request)
        return response

    async def stream(self, request: pb.GenerateRequest) -> list[pb.GenerateStreamResponse]:
        """Return all messages of GenerateStream."""
        return [message async for message in self.stub.GenerateStream(request)]

    async def is_empty(self) -> bool:
        """Return whether no request holds a block of the KV cache. vLLM refuses to reset the prefix cache otherwise."""
        was_reset: bool = await self.llm.reset_prefix_cache()
        return was_reset

    async def wait_until_empty(self) -> None:
        """Return when no request holds a block of the KV cache; the test's timeout is the limit."""
        while not await self.is_empty():
            pass

    async def wait_for_unfinished(self, count: int) -> None:
        """Return when the engine's front end has `count` unfinished requests; the test's timeout is the limit."""
        while self.unfinished != count:  # noqa: ASYNC110 - vLLM has no event for it
            await asyncio.sleep(0)

    @property
    def unfinished(self) -> int:
        """Number of unfinished requests in the engine's front end."""
        count: int = self.llm.get_num_unfinished_requests()
        return count


@pytest_asyncio.fixture(loop_scope="session")
async def served(session_server: Served) -> Served:
    """The session's server with no adapter loaded; adapters of the previous test are unloaded."""
    for lora in (await session_server.stub.ListLoras(pb.ListLorasRequest())).loras:
        await session_server.stub.UnloadLora(pb.UnloadLoraRequest(name=lora.name))
    return session_server


@pytest_asyncio.fixture(loop_scope="session")
async def address(served: Served) -> AsyncIterator[str]:
    """The address of a second server on the session's engine, with health SERVING."""
    health = Health(NAME)
    server, port = await create_server(YuanService(GenerationService(served.engine)), health, "127.0.0.1:0")
    await server.start()
    await health.set_serving()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def session_server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """A model with random weights on vLLM, served by the real server on a free port."""
    async with serve_demo(FLAGS, tmp_path_factory.mktemp("adapters")) as served:
        yield served


@contextmanager
def metrics_kept() -> Iterator[None]:
    """Register the metrics of an earlier engine again, which vLLM removes when the block starts another one."""
    before = _engine_metrics()
    yield
    if before:
        for collector in _engine_metrics():
            REGISTRY.unregister(collector)
        for collector in before:
            REGISTRY.register(collector)


def _engine_metrics() -> list[Collector]:
    return [each for each in REGISTRY._collector_to_names if getattr(each, "_name", "").startswith("vllm:")]


@asynccontextmanager
async def serve_demo(flags: tuple[str, ...], lora_folder: Path, model: Path | None = None) -> AsyncIterator[Served]:
    """Serve a model, random weights by default, with the demo's flags and others, and with adapters in a folder."""
    env.set_defaults()
    model = model or random_checkpoint()
    weights = load_file(model / "model.safetensors")
    for seed, name in enumerate(ADAPTERS):
        write_adapter(lora_folder / name, weights, ["v_proj", "up_proj"], seed=seed)
    write_adapter(lora_folder / "broken", {"lm_head.weight": torch.zeros(8, 8)}, ["lm_head"])
    settings = Settings(model=str(model), host="127.0.0.1", port=0, grace_seconds=0, engine_flags=(*DEMO_FLAGS, *flags))
    with metrics_kept():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # vLLM and torch warn while they are imported
            from engine_forks import fork_engines

            from yuan_grpc.server.engine.vllm.args import parse_engine_flags
            from yuan_grpc.server.engine.vllm.engine import VllmEngine

            fork_engines()
            engine = VllmEngine(parse_engine_flags(settings.vllm_flags), lora_folder)
            await engine.start()
        server, port = await create_server(YuanService(GenerationService(engine)), Health(NAME), "127.0.0.1:0")
        try:
            await server.start()
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                stub, tokenizer = yuan_pb2_grpc.YuanServiceStub(channel), YuanTokenizer.from_pretrained(model)
                yield Served(f"127.0.0.1:{port}", model, lora_folder, stub, tokenizer, engine)
            await server.stop(None)
        finally:
            engine.stop()


@pytest.fixture
def buf() -> str:
    """The path of the environment's `buf`, used in place of grpcurl."""
    return str(Path(sys.executable).with_name("buf"))


@pytest.fixture(scope="session")
def tokens(demo: Path) -> int:
    """The vocabulary size, without padding."""
    return len(YuanTokenizer.from_pretrained(demo))
