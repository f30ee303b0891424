"""`vllm.grpc.engine.VllmEngine`, called with the messages of smg-grpc-proto, with a fake engine."""

import hashlib
import io
import zipfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_engine import FakeEngine, last, more
from google.rpc import error_details_pb2, status_pb2
from servers import serve_grpc

from yuan_grpc.server.engine.load import EngineLoad
from yuan_grpc.server.engine.types import ChoiceDelta, FinishReason, RankedToken, StepOutput, TokenLogprobs
from yuan_grpc.server.settings.mesh import MeshSettings

proto = pytest.importorskip("smg_grpc_proto", reason="needs the messages: pip install smg-grpc-proto")
vpb, common = proto.vllm_engine_pb2, pytest.importorskip("smg_grpc_proto.generated.common_pb2")
ENABLED = MeshSettings(vllm_engine=True)


@asynccontextmanager
async def connect(engine: FakeEngine, settings: MeshSettings = ENABLED) -> AsyncIterator[Any]:
    """Serve an engine; yield a stub of SMG's service."""
    async with serve_grpc(engine, mesh=settings) as address, grpc.aio.insecure_channel(address) as channel:
        yield proto.vllm_engine_pb2_grpc.VllmEngineStub(channel)


def request_of(**fields: Any) -> Any:
    """Return a request with the prompt AB."""
    fields.setdefault("tokenized", vpb.TokenizedInput(input_ids=[65, 66]))
    return vpb.GenerateRequest(**fields)


async def responses(engine: FakeEngine, request: Any) -> list[Any]:
    async with connect(engine) as stub:
        return [response async for response in stub.Generate(request)]


async def test_a_stream_has_the_tokens_of_each_step_and_an_end() -> None:
    engine = FakeEngine(more("a"), last("b"))
    *chunks, end = await responses(engine, request_of(request_id="mine", stream=True))
    assert [list(response.chunk.token_ids) for response in chunks] == [[97], [98]]
    assert {response.chunk.prompt_tokens for response in chunks} == {2}
    assert (end.complete.finish_reason, list(end.complete.output_ids)) == ("length", [98])
    assert engine.requests[0].prompt == [65, 66]


async def test_without_stream_there_is_one_message_for_each_choice() -> None:
    script = StepOutput(
        [ChoiceDelta(index, "a", [97], finish_reason=FinishReason.STOP, stop_reason=97) for index in range(2)]
    )
    params = vpb.SamplingParams(n=2, stop_token_ids=[97])
    first, second = await responses(FakeEngine(script), request_of(text="AB", tokenized=None, sampling_params=params))
    assert [first.complete.index, second.complete.index] == [0, 1]
    assert first.complete.finish_reason == "stop"
    assert first.complete.matched_token_id == 97


async def test_parameters_reach_the_engine() -> None:
    engine = FakeEngine(last("b"))
    params = vpb.SamplingParams(
        temperature=0.5, top_k=7, min_p=0.25, stop=["x"], seed=3, max_tokens=5, json_object=True
    )
    params.logit_bias[65] = 2
    await responses(engine, request_of(sampling_params=params))
    sampling = engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 1.0, 7, 0.25)
    assert (sampling.max_tokens, sampling.seed, sampling.stop) == (5, 3, ("x",))
    assert dict(sampling.logit_bias) == {65: 2.0}
    assert sampling.structured_outputs is not None
    assert sampling.structured_outputs.kind == "json_object"


async def test_an_absent_limit_is_that_of_the_model() -> None:
    engine = FakeEngine(last("b"))
    await responses(engine, request_of())
    assert engine.requests[0].sampling.max_tokens >= engine.info.max_model_len - 2


async def test_log_probabilities_are_converted() -> None:
    position = TokenLogprobs(
        RankedToken(97, "a", -0.5, 2), [RankedToken(98, "b", -0.25, 1), RankedToken(97, "a", -0.5, 2)]
    )
    delta = ChoiceDelta(0, "a", [97], logprobs=[position], finish_reason=FinishReason.LENGTH)
    params = vpb.SamplingParams(logprobs=2)
    [end] = await responses(FakeEngine(StepOutput([delta])), request_of(sampling_params=params))
    logprobs = end.complete.output_logprobs
    assert (list(logprobs.token_ids), list(logprobs.token_logprobs)) == ([97], [-0.5])
    assert [list(top.token_ids) for top in logprobs.top_logprobs] == [[98, 97]]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"mm_inputs": vpb.MultimodalInputs()}, "mm_inputs"),
        ({"kv_transfer_params_json": "{}"}, "kv_transfer_params_json"),
        ({"data_parallel_rank": 3}, "data_parallel_rank"),
        ({"sampling_params": vpb.SamplingParams(temperature=9)}, "temperature"),
    ],
)
async def test_what_does_not_apply_is_refused_with_its_name(fields: dict[str, Any], field: str) -> None:
    engine = FakeEngine(last())
    async with connect(engine) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            [_ async for _ in stub.Generate(request_of(**fields))]
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    trailers = dict(raised.value.trailing_metadata() or ())
    details, request = status_pb2.Status.FromString(trailers["grpc-status-details-bin"]), error_details_pb2.BadRequest()
    assert details.details[1].Unpack(request)
    assert [violation.field for violation in request.field_violations] == [field]
    assert engine.requests == []


async def test_abort_ends_calls_of_other_connections() -> None:
    engine = FakeEngine(more("a"), hangs=True)
    async with serve_grpc(engine, mesh=ENABLED) as address:
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with (
            grpc.aio.insecure_channel(address, options=options) as first,
            grpc.aio.insecure_channel(address, options=options) as second,
        ):
            call = proto.vllm_engine_pb2_grpc.VllmEngineStub(first).Generate(request_of(request_id="one", stream=True))
            await call.read()
            stub = proto.vllm_engine_pb2_grpc.VllmEngineStub(second)
            await stub.Abort(vpb.AbortRequest(request_ids=["gone", "one"]))
            assert await call.code() is grpc.StatusCode.CANCELLED
    assert engine.running == 0


async def test_a_cancelled_call_frees_its_engine_request() -> None:
    engine = FakeEngine(more("a"), hangs=True)
    async with connect(engine) as stub:
        call = stub.Generate(request_of(stream=True))
        await call.read()
        call.cancel()
        await engine.freed.wait()


async def test_the_load_is_that_of_the_engine() -> None:
    engine = FakeEngine()
    engine.loads = [
        EngineLoad(0, 3, 2, max_num_seqs=4, kv_cache_usage=0.5, kv_cache_tokens=1000, tokens_per_second=90),
        EngineLoad(1),
    ]
    async with connect(engine) as stub:
        response = await stub.GetLoads(vpb.GetLoadsRequest())
        second = await stub.GetLoads(vpb.GetLoadsRequest(dp_rank=1))
    load = response.loads[0]
    assert (load.num_running_reqs, load.num_waiting_reqs, load.num_total_reqs) == (3, 2, 5)
    assert (load.token_usage, load.num_used_tokens, load.max_total_num_tokens) == (0.5, 500, 1000)
    assert (load.gen_throughput, load.max_running_requests) == (90, 4)
    assert (response.dp_rank_count, [load.dp_rank for load in second.loads]) == (2, [1])


async def test_health_is_that_of_the_engine() -> None:
    for is_ready in (True, False):
        async with connect(FakeEngine(is_ready=is_ready)) as stub:
            assert (await stub.HealthCheck(vpb.HealthCheckRequest())).healthy is is_ready


async def test_the_model_and_the_server_are_described() -> None:
    engine = FakeEngine(more("a"), hangs=True)
    async with connect(engine) as stub:
        call = stub.Generate(request_of(stream=True))
        await call.read()
        model = await stub.GetModelInfo(vpb.GetModelInfoRequest())
        server = await stub.GetServerInfo(vpb.GetServerInfoRequest())
        call.cancel()
    assert (model.model_path, model.served_model_name, model.model_type) == ("/models/fake", "fake", "yuan")
    assert (model.max_context_length, model.is_generation, list(model.eos_token_ids)) == (64, True, [0])
    assert (server.active_requests, server.server_type, server.data_parallel_size) == (1, "vllm-grpc", 1)


async def test_the_tokenizer_is_an_archive_of_its_files(demo: Path) -> None:
    engine = FakeEngine()
    engine.info = replace(engine.info, path=str(demo))
    async with connect(engine) as stub:
        chunks = [chunk async for chunk in stub.GetTokenizer(common.GetTokenizerRequest())]
        again = [chunk async for chunk in stub.GetTokenizer(common.GetTokenizerRequest())]
    data = b"".join(chunk.data for chunk in chunks)
    assert [chunk.sha256 for chunk in chunks] == [""] * (len(chunks) - 1) + [hashlib.sha256(data).hexdigest()]
    assert again == chunks
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert "tokenizer.model" in archive.namelist()
        assert archive.read("config.json") == (demo / "config.json").read_bytes()
        assert not [name for name in archive.namelist() if name.endswith((".py", ".safetensors"))]


async def test_a_model_without_files_of_a_tokenizer_is_a_failed_precondition(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.info = replace(engine.info, path=str(tmp_path))
    async with connect(engine) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            [_ async for _ in stub.GetTokenizer(common.GetTokenizerRequest())]
    assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_other_methods_are_unimplemented() -> None:
    async with connect(FakeEngine()) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.Embed(vpb.EmbedRequest())
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_the_service_is_not_served_unless_it_is_enabled() -> None:
    async with connect(FakeEngine(), MeshSettings()) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.HealthCheck(vpb.HealthCheckRequest())
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
