"""The load of the real engine, and its tokens over `vllm.grpc.engine.VllmEngine`."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import pytest_asyncio
from engine.conftest import Served

from yuan_grpc.server.core.generation_service import GenerationService
from yuan_grpc.server.engine.load import EngineLoad, LoadBoard
from yuan_grpc.server.grpc.health import Health
from yuan_grpc.server.grpc.mesh import Mesh
from yuan_grpc.server.grpc.servicer import NAME, YuanService
from yuan_grpc.server.server import create_server
from yuan_grpc.server.settings.mesh import MeshSettings
from yuan_grpc.v1 import yuan_pb2 as pb

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]
LONG = pb.GenerateRequest(prompt="世界", max_tokens=1500, ignore_eos=True)


@pytest.mark.filterwarnings("ignore")  # vLLM and torch warn while they are imported
async def test_a_rank_posts_its_load_after_each_step() -> None:
    from vllm.v1.metrics.stats import IterationStats, SchedulerStats

    from yuan_grpc.server.engine.vllm.load import LoadLogger

    config: Any = SimpleNamespace(
        cache_config=SimpleNamespace(num_gpu_blocks=10, block_size=16),
        scheduler_config=SimpleNamespace(max_num_seqs=4),
    )
    board, tokens = LoadBoard(), IterationStats()
    tokens.num_generation_tokens = 5
    loggers = [LoadLogger(board, config, rank) for rank in (1, 0)]
    loggers[0].record(SchedulerStats(num_running_reqs=2, num_waiting_reqs=1, num_skipped_waiting_reqs=3), tokens)
    first, second = board.read()
    assert first == EngineLoad(0, max_num_seqs=4, kv_cache_tokens=160)
    assert (second.rank, second.num_running, second.num_waiting) == (1, 2, 4)
    assert second.tokens_per_second > 0
    loggers[0].record(None, tokens)
    assert board.read()[1] == second
    loggers[0].record(SchedulerStats(), None)
    assert board.read()[1] == EngineLoad(1, max_num_seqs=4, kv_cache_tokens=160)


@pytest.mark.filterwarnings("ignore")  # vLLM and torch warn while they are imported
async def test_tokens_per_second_are_those_of_the_last_seconds() -> None:
    from yuan_grpc.server.engine.vllm.load import RATE_SECONDS, TokenRate

    rate = TokenRate(0)
    assert rate.add(10, 1) == 10
    assert rate.add(10, RATE_SECONDS) == 20 / RATE_SECONDS
    assert rate.add(1000, RATE_SECONDS + 1) == 20 / RATE_SECONDS
    assert rate.add(0, 2 * RATE_SECONDS) == 1000 / RATE_SECONDS


async def wait_for_load(served: Served, running: int, waiting: int) -> pb.EngineLoad:
    """Return the load once it has these numbers; the timeout of the test is the limit."""
    while True:
        (load,) = (await served.stub.GetLoads(pb.GetLoadsRequest())).loads
        if (load.num_running_reqs, load.num_waiting_reqs) == (running, waiting):
            return load  # type: ignore[no-any-return]
        await asyncio.sleep(0.01)


async def test_the_load_follows_running_and_waiting_requests(served: Served) -> None:
    await served.wait_until_empty()
    calls = [served.stub.GenerateStream(LONG) for _ in range(3)]  # at most two run at a time
    busy = await wait_for_load(served, 2, 1)
    response = await served.stub.GetLoads(pb.GetLoadsRequest())
    for call in calls:
        call.cancel()
    idle = await wait_for_load(served, 0, 0)
    assert busy.max_num_seqs == 2
    assert 0 < busy.kv_cache_usage < 1
    assert response.loads[0].tokens_per_second > 0
    assert response.utilization == 1.5
    assert (idle.kv_cache_usage, idle.tokens_per_second) == (0, 0)


@pytest_asyncio.fixture(loop_scope="session")
async def vllm_stub(served: Served) -> AsyncIterator[Any]:
    """A stub of the service of SMG, on the engine of the session."""
    proto = pytest.importorskip("smg_grpc_proto", reason="needs the messages: pip install smg-grpc-proto")
    service = GenerationService(served.engine)
    mesh = Mesh(MeshSettings(vllm_engine=True), service)
    server, port = await create_server(YuanService(service), Health(NAME), "127.0.0.1:0", mesh=mesh)
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield proto.vllm_engine_pb2_grpc.VllmEngineStub(channel)
    await server.stop(None)


async def test_the_service_of_smg_returns_the_tokens_of_generate(served: Served, vllm_stub: Any) -> None:
    from smg_grpc_proto import vllm_engine_pb2 as vpb

    prompt = served.tokenizer.encode("世界上最高的山是", add_special_tokens=False)
    request = pb.GenerateRequest(temperature=0, max_tokens=12, logprobs=2, prompt_logprobs=1, flat_logprobs=True)
    request.prompt_token_ids.ids.extend(prompt)
    expected = await served.generate(request)
    params = vpb.SamplingParams(temperature=0, max_tokens=12, logprobs=2, prompt_logprobs=1)
    asked = vpb.GenerateRequest(tokenized=vpb.TokenizedInput(input_ids=prompt), sampling_params=params)
    [whole] = [response.complete async for response in vllm_stub.Generate(asked)]
    asked.stream = True
    *chunks, end = [response async for response in vllm_stub.Generate(asked)]
    choice = expected.choices[0]
    assert list(whole.output_ids) == list(choice.token_ids)
    assert [token for response in chunks for token in response.chunk.token_ids] == list(choice.token_ids)
    assert end.complete.finish_reason == whole.finish_reason == "length"
    flat = choice.flat_logprobs
    assert list(whole.output_logprobs.token_logprobs) == [flat.logprobs[start] for start in flat.starts]
    assert len(whole.input_logprobs.token_logprobs) == len(prompt) == whole.prompt_tokens
    assert chunks[0].chunk.input_logprobs == whole.input_logprobs


async def test_the_model_is_described_to_smg(served: Served, vllm_stub: Any) -> None:
    from smg_grpc_proto import vllm_engine_pb2 as vpb

    model = await vllm_stub.GetModelInfo(vpb.GetModelInfoRequest())
    tokenizer = served.tokenizer
    assert next(iter(model.eos_token_ids)) == tokenizer.eos_token_id
    assert (model.pad_token_id, model.vocab_size) == (tokenizer.pad_token_id, len(tokenizer))
    (load,) = (await vllm_stub.GetLoads(vpb.GetLoadsRequest())).loads
    assert load.max_total_num_tokens > 0
