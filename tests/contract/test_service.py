"""The contract, over a real port, with an engine by hand: statuses, cancellation, streams, health."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
import serving
from fake_engine import FakeEngine, last, more
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2
from health_client import health_stub

from yuan_grpc.server.core.limits import MAX_IN_FLIGHT
from yuan_grpc.server.engine.types import ChoiceDelta, FinishReason, RankedToken, StepOutput, TokenLogprobs
from yuan_grpc.server.errors import INTERNAL_MESSAGE, OverloadedError, ServiceError, UnavailableError
from yuan_grpc.server.grpc.health import Health
from yuan_grpc.server.grpc.servicer import NAME
from yuan_grpc.server.grpc.stream_writer import StreamWriter
from yuan_grpc.v1 import yuan_pb2 as pb
from yuan_grpc.v1 import yuan_pb2_grpc

REQUEST = pb.GenerateRequest(prompt="AB")


@asynccontextmanager
async def served(engine: FakeEngine, health: Health | None = None) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a server of this engine's."""
    async with serving.served(engine, health) as address, grpc.aio.insecure_channel(address) as channel:
        yield channel


def stub_of(channel: grpc.aio.Channel) -> yuan_pb2_grpc.YuanServiceStub:
    return yuan_pb2_grpc.YuanServiceStub(channel)


async def status_from(
    engine: FakeEngine, request: pb.GenerateRequest = REQUEST
) -> tuple[grpc.aio.AioRpcError, list[str]]:
    """The error of a unary call, and the types of its details."""
    async with served(engine) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub_of(channel).Generate(request)
    trailers = dict(raised.value.trailing_metadata() or ())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    assert (status.code, status.message) == (raised.value.code().value[0], raised.value.details())
    return raised.value, [detail.TypeName() for detail in status.details]


async def test_generate_answers_once() -> None:
    async with served(FakeEngine(last("yes"))) as channel:
        response = await stub_of(channel).Generate(pb.GenerateRequest(prompt="AB", request_id="mine"))
    assert (response.request_id, response.model, response.choices[0].text) == ("mine", "fake", "yes")
    assert response.usage == pb.Usage(prompt_tokens=2, completion_tokens=3)


async def test_a_stream_is_the_steps_one_by_one() -> None:
    async with served(FakeEngine(more("a"), more("b"), last("c"))) as channel:
        first, *parts = [part async for part in stub_of(channel).GenerateStream(REQUEST)]
    assert (first.usage, len(first.choices)) == (pb.Usage(prompt_tokens=2), 0)
    assert [part.choices[0].text for part in parts] == ["a", "b", "c"]
    assert len({part.request_id for part in parts}) == 1


async def test_an_absent_request_id_is_made_up() -> None:
    async with served(FakeEngine(last())) as channel:
        first, second = [await stub_of(channel).Generate(REQUEST) for _ in range(2)]
    assert first.request_id
    assert first.request_id != second.request_id


@pytest.mark.parametrize("by_ids", [False, True])
async def test_echo_puts_the_prompt_in_front(by_ids: bool) -> None:
    request = pb.GenerateRequest(echo=True)
    if by_ids:
        request.prompt_token_ids.ids.extend([65, 66])
    else:
        request.prompt = "AB"
    async with served(FakeEngine(more("c"), last("d"))) as channel:
        parts = [part async for part in stub_of(channel).GenerateStream(request)]
    assert "".join(choice.text for part in parts for choice in part.choices) == "ABcd"


async def test_a_bad_request_never_reaches_the_engine() -> None:
    engine = FakeEngine(last())
    error, details = await status_from(engine, pb.GenerateRequest(prompt="AB", temperature=-1))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "`temperature` must be between 0 and 2, not -1.0"
    assert details == ["google.rpc.ErrorInfo", "google.rpc.BadRequest"]
    assert engine.requests == []


@pytest.mark.parametrize("raw", [b"\xff\xff\xff", b"\x0a\x02\xff\xfe"], ids=["no message", "no UTF-8"])
async def test_bytes_that_are_no_request_are_an_invalid_argument(raw: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async with served(FakeEngine()) as channel:
        call: Any = channel.unary_unary(f"/{NAME}/Generate")
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call(raw)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "UTF-8" in (raised.value.details() or "")
    assert "Traceback" not in caplog.text


async def test_every_call_leaves_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine(more("a"), hangs=True)
    with caplog.at_level(logging.INFO):
        async with served(engine) as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await stub_of(channel).Generate(pb.GenerateRequest(request_id="bad"))
            call = stub_of(channel).GenerateStream(pb.GenerateRequest(prompt="AB", request_id="cut"))
            await call.read()
            call.cancel()
            await engine.freed.wait()
    lines = [line.split(" after")[0] for line in caplog.messages if line.startswith("Generate")]
    assert lines == ["Generate 'bad': INVALID_ARGUMENT", "GenerateStream 'cut': CANCELLED"]


async def test_a_lost_engine_is_unavailable() -> None:
    error, details = await status_from(FakeEngine(UnavailableError("the engine was lost")))
    assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "the engine was lost")
    assert details == ["google.rpc.ErrorInfo"]


async def test_an_engine_that_is_not_ready_is_unavailable() -> None:
    error, _ = await status_from(FakeEngine(last(), is_ready=False))
    assert error.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_full_queue_says_when_to_try_again() -> None:
    error, details = await status_from(FakeEngine(OverloadedError("the engine's queue is full")))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details == ["google.rpc.ErrorInfo", "google.rpc.RetryInfo"]
    assert 1000 <= int(dict(error.trailing_metadata() or ())["grpc-retry-pushback-ms"]) <= 2000


async def test_an_unknown_error_tells_the_log_and_not_the_caller(caplog: pytest.LogCaptureFixture) -> None:
    request = pb.GenerateRequest(prompt="AB", request_id="the-one")
    with caplog.at_level(logging.ERROR):
        error, _ = await status_from(FakeEngine(KeyError("/secret/path")), request)
    assert (error.code(), error.details()) == (grpc.StatusCode.INTERNAL, INTERNAL_MESSAGE)
    assert "the-one" in caplog.text
    assert "/secret/path" in caplog.text


async def test_an_error_in_the_middle_of_a_stream_ends_it_with_a_status() -> None:
    async with served(FakeEngine(more("a"), UnavailableError("lost"))) as channel:
        call = stub_of(channel).GenerateStream(REQUEST)
        await call.read()
        assert (await call.read()).choices[0].text == "a"
        with pytest.raises(grpc.aio.AioRpcError, match="lost"):
            await call.read()


async def test_a_live_request_id_is_not_given_twice() -> None:
    engine = FakeEngine(more("a"), hangs=True)
    request = pb.GenerateRequest(prompt="AB", request_id="mine")
    async with served(engine) as channel:
        running = stub_of(channel).GenerateStream(request)
        await running.read()
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub_of(channel).Generate(request)
        assert raised.value.code() is grpc.StatusCode.ALREADY_EXISTS
        assert len(engine.requests) == 1
        running.cancel()


async def test_a_request_id_is_free_again_when_its_call_has_ended() -> None:
    async with served(FakeEngine(last())) as channel:
        request = pb.GenerateRequest(prompt="AB", request_id="mine")
        for _ in range(2):
            await stub_of(channel).Generate(request)


async def test_a_cancelled_unary_call_frees_its_request() -> None:
    engine = FakeEngine(hangs=True)
    async with served(engine) as channel:
        call = stub_of(channel).Generate(REQUEST)
        waiting = asyncio.ensure_future(call.code())
        await engine.began.wait()
        call.cancel()
        assert await waiting is grpc.StatusCode.CANCELLED
        await engine.freed.wait()


async def test_a_cancelled_stream_frees_its_request() -> None:
    engine = FakeEngine(more("a"), hangs=True)
    async with served(engine) as channel:
        call = stub_of(channel).GenerateStream(REQUEST)
        await call.read()
        call.cancel()
        await engine.freed.wait()


async def test_a_stream_nobody_reads_frees_its_request_when_cancelled() -> None:
    engine = FakeEngine(*[more("x" * 65536)] * 1000)  # more than HTTP/2's windows hold: the server has to wait
    async with served(engine) as channel:
        call = stub_of(channel).GenerateStream(REQUEST)
        await engine.began.wait()
        await call.read()
        assert not engine.freed.is_set()
        call.cancel()
        await engine.freed.wait()


async def test_a_dropped_connection_frees_its_request() -> None:
    engine = FakeEngine(more("a"), hangs=True)
    async with served(engine) as channel:
        call = stub_of(channel).GenerateStream(REQUEST)
        await call.read()
        await channel.close()
        await engine.freed.wait()


async def test_who_is_found_gone_while_a_message_is_written_has_cancelled() -> None:
    class Gone:
        async def send_initial_metadata(self, metadata: object) -> None: ...

        async def write(self, message: object) -> None:
            raise grpc.aio.InternalError("the call has ended")

    gone: Any = Gone()
    with pytest.raises(asyncio.CancelledError):
        await StreamWriter(gone).write(pb.GenerateStreamResponse())


async def test_a_deadline_frees_its_request() -> None:
    engine = FakeEngine(more("a"), hangs=True)
    async with served(engine) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            [part async for part in stub_of(channel).GenerateStream(REQUEST, timeout=0.2)]
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await engine.freed.wait()


async def test_health_is_true_from_start_to_stop() -> None:
    health = Health(NAME)
    async with served(FakeEngine(), health) as channel:
        watch = health_stub(channel).Watch(health_pb2.HealthCheckRequest(service=NAME))
        seen = [(await watch.read()).status]
        await health.set_serving()
        seen.append((await watch.read()).status)
        await health.set_stopping()
        seen.append((await watch.read()).status)
        watch.cancel()
    status = health_pb2.HealthCheckResponse
    assert seen == [status.NOT_SERVING, status.SERVING, status.NOT_SERVING]


async def test_other_services_keep_their_own_statuses() -> None:
    async with served(FakeEngine()) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await health_stub(channel).Check(health_pb2.HealthCheckRequest(service="unknown"))
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


async def test_the_details_name_the_field() -> None:
    async with served(FakeEngine()) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub_of(channel).Generate(pb.GenerateRequest(prompt="AB", n=0))
    trailers = dict(raised.value.trailing_metadata() or ())
    info, bad_request = status_pb2.Status.FromString(trailers["grpc-status-details-bin"]).details
    unpacked = error_details_pb2.BadRequest()
    assert bad_request.Unpack(unpacked)
    assert [violation.field for violation in unpacked.field_violations] == ["n"]
    reason = error_details_pb2.ErrorInfo()
    assert info.Unpack(reason)
    assert (reason.reason, reason.domain) == ("INVALID_REQUEST", "yuan.v1")


async def test_prompt_logprobs_come_before_any_token() -> None:
    position = TokenLogprobs(RankedToken(65, "A", 0.0, 0), ())
    delta = ChoiceDelta(0, "a", [97], finish_reason=FinishReason.LENGTH)
    engine = FakeEngine(StepOutput([delta], prompt_logprobs=[position]))
    request = pb.GenerateRequest(prompt="AB", prompt_logprobs=0)
    async with served(engine) as channel:
        first, *rest = [part async for part in stub_of(channel).GenerateStream(request)]
        whole = await stub_of(channel).Generate(request)
    assert (len(first.prompt_logprobs), len(first.choices)) == (1, 0)
    assert [part.choices[0].text for part in rest] == ["a"]
    assert whole.prompt_logprobs == first.prompt_logprobs


async def test_the_seed_that_was_used_comes_back() -> None:
    async with served(engine := FakeEngine(last())) as channel:
        stub = stub_of(channel)
        own = await stub.Generate(pb.GenerateRequest(prompt="AB", seed=0))
        drawn = await stub.Generate(REQUEST)
        first = await stub.GenerateStream(REQUEST).read()
        greedy = await stub.Generate(pb.GenerateRequest(prompt="AB", temperature=0, seed=5))
    assert (own.HasField("seed"), own.seed) == (True, 0)
    assert [engine_request.sampling.seed for engine_request in engine.requests] == [0, drawn.seed, first.seed, None]
    assert drawn.seed != first.seed
    assert not greedy.HasField("seed")


async def test_a_stream_shows_that_it_lives() -> None:
    request = pb.GenerateRequest(prompt="AB", heartbeat_interval=Duration(nanos=100_000_000))
    async with served(FakeEngine(hangs=True)) as channel:
        call = stub_of(channel).GenerateStream(request)
        first, *beats = [await call.read() for _ in range(3)]
        call.cancel()
    assert first.HasField("usage")
    assert [(beat.model, len(beat.choices), beat.HasField("usage")) for beat in beats] == [("fake", 0, False)] * 2


@pytest.mark.parametrize("best_of", [2, 3])
async def test_a_deadline_gives_what_there_is_where_asked(best_of: int) -> None:
    request = pb.GenerateRequest(prompt="AB", partial_on_deadline=True, n=2, best_of=best_of)
    async with served(engine := FakeEngine(more("a", 0), last("b", 1, -1.0), hangs=True)) as channel:
        response = await stub_of(channel).Generate(request, timeout=1)
        parts = [part async for part in stub_of(channel).GenerateStream(request, timeout=1)]
    texts: dict[int, str] = {}
    for choice in [choice for part in parts for choice in part.choices]:
        texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert list(texts.values()) == [choice.text for choice in response.choices]
    assert {choice.text for choice in response.choices} == {"a", "b"}
    assert {choice.finish_reason for choice in response.choices} == {
        pb.FINISH_REASON_DEADLINE,
        pb.FINISH_REASON_LENGTH,
    }
    assert engine.running == 0


async def test_a_conversation_is_a_prompt_in_the_models_format() -> None:
    messages = [pb.Message(role="user", content="A"), pb.Message(role="assistant", content="B")]
    messages.append(pb.Message(role="user", content="C"))
    async with served(engine := FakeEngine(last("d"))) as channel:
        response = await stub_of(channel).Generate(pb.GenerateRequest(messages=messages, echo=True))
        tokens = await stub_of(channel).Tokenize(pb.TokenizeRequest(messages=messages))
    assert response.choices[0].text == "A|B|C>d"
    assert (tokens.text, [token.id for token in tokens.tokens]) == ("A|B|C>", list(engine.requests[0].prompt))


async def test_a_cut_prompt_is_what_is_echoed_and_counted() -> None:
    request = pb.GenerateRequest(prompt="ABC", truncate_prompt_tokens=2, echo=True, return_prompt_token_ids=True)
    async with served(FakeEngine(last("d"))) as channel:
        response = await stub_of(channel).Generate(request)
    assert response.choices[0].text == "BCd"
    assert (response.usage.prompt_tokens, list(response.prompt_token_ids)) == (2, [66, 67])


async def test_tokens_have_their_stretches_and_come_back_as_text() -> None:
    async with served(FakeEngine()) as channel:
        stub = stub_of(channel)
        response = await stub.Tokenize(pb.TokenizeRequest(prompt="AB"))
        text = await stub.Detokenize(pb.DetokenizeRequest(token_ids=[token.id for token in response.tokens]))
    assert (response.count, text.text) == (2, "AB")
    assert response.tokens[1] == pb.Token(id=66, piece="B", start=1, end=2)


@pytest.mark.parametrize(
    ("method", "request_", "code"),
    [
        ("Tokenize", pb.TokenizeRequest(), grpc.StatusCode.INVALID_ARGUMENT),
        ("Detokenize", pb.DetokenizeRequest(token_ids=[0x110000]), grpc.StatusCode.INVALID_ARGUMENT),
        ("Abort", pb.AbortRequest(), grpc.StatusCode.INVALID_ARGUMENT),
        ("Abort", pb.AbortRequest(request_id="x" * 100_000), grpc.StatusCode.NOT_FOUND),
        ("UnloadLora", pb.UnloadLoraRequest(name="none"), grpc.StatusCode.NOT_FOUND),
        ("Generate", pb.GenerateRequest(prompt="AB", model="gpt"), grpc.StatusCode.NOT_FOUND),
        ("Generate", pb.GenerateRequest(prompt="AB", priority=1), grpc.StatusCode.FAILED_PRECONDITION),
    ],
    ids=["no text", "no token", "no name", "not running", "not loaded", "no model", "no priorities"],
)
async def test_each_rpc_says_what_is_wrong(method: str, request_: Any, code: grpc.StatusCode) -> None:
    async with served(FakeEngine()) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await getattr(stub_of(channel), method)(request_)
    assert raised.value.code() is code


async def test_the_model_tells_its_limits_and_adapters() -> None:
    async with served(FakeEngine()) as channel:
        stub = stub_of(channel)
        await stub.LoadLora(pb.LoadLoraRequest(name="style"))
        model = await stub.GetModel(pb.GetModelRequest())
        listed = await stub.ListLoras(pb.ListLorasRequest())
        await stub.UnloadLora(pb.UnloadLoraRequest(name="style"))
        assert not (await stub.ListLoras(pb.ListLorasRequest())).loras
    assert (model.name, model.limits.max_model_len, model.limits.HasField("max_num_queued_reqs")) == ("fake", 64, False)
    assert (list(model.lora.loaded), [lora.name for lora in listed.loras]) == (["style"], ["style"])


@pytest.mark.parametrize("stream", [False, True])
async def test_an_aborted_call_ends_with_cancelled_and_is_free(stream: bool) -> None:
    request = pb.GenerateRequest(prompt="AB", request_id="mine")
    async with served(engine := FakeEngine(more("a"), hangs=True)) as channel:
        stub = stub_of(channel)

        async def call() -> None:
            if stream:
                [part async for part in stub.GenerateStream(request)]
            else:
                await stub.Generate(request)

        calling = asyncio.ensure_future(call())
        await engine.began.wait()
        await stub.Abort(pb.AbortRequest(request_id="mine"))
        assert engine.running == 0
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await calling
    assert raised.value.code() is grpc.StatusCode.CANCELLED
    trailers = dict(raised.value.trailing_metadata() or ())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.reason == "ABORTED"


async def test_a_stream_nobody_reads_can_be_aborted() -> None:
    engine = FakeEngine(*[more("x" * 65536)] * 1000)
    async with served(engine) as channel:
        stub = stub_of(channel)
        call = stub.GenerateStream(pb.GenerateRequest(prompt="AB", request_id="mine"))
        await engine.began.wait()
        await stub.Abort(pb.AbortRequest(request_id="mine"))
        assert engine.running == 0
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            [part async for part in call]
        assert raised.value.code() is grpc.StatusCode.CANCELLED


async def until(holds: Callable[[], bool]) -> None:
    """Returns when it holds; the test's timeout is the limit."""
    while not holds():  # noqa: ASYNC110 - the fake engine has no event for it
        await asyncio.sleep(0)


def batch_of(*requests: pb.GenerateRequest) -> list[pb.GenerateBatchRequest]:
    return [pb.GenerateBatchRequest(request=request) for request in requests]


async def test_a_batch_answers_each_request_with_a_result_or_a_status() -> None:
    items = batch_of(REQUEST, pb.GenerateRequest(prompt="AB", n=0), pb.GenerateRequest(prompt="AB", request_id="mine"))
    items.append(pb.GenerateBatchRequest())
    async with served(FakeEngine(last("yes"))) as channel:
        answers = [answer async for answer in stub_of(channel).GenerateBatch(iter(items))]
    by_index = {answer.index: answer for answer in answers}
    assert [by_index[i].WhichOneof("result") for i in range(4)] == ["response", "error", "response", "error"]
    assert by_index[2].request_id == by_index[2].response.request_id == "mine"
    status = status_pb2.Status.FromString(by_index[1].error.SerializeToString())
    assert (status.code, status.message) == (3, "`n` must be between 1 and 128, not 0")
    assert status.details[1].Is(error_details_pb2.BadRequest.DESCRIPTOR)


async def test_a_batch_runs_a_bounded_number_at_a_time() -> None:
    items = batch_of(*[pb.GenerateRequest(prompt="AB", request_id=str(i)) for i in range(MAX_IN_FLIGHT + 10)])
    async with served(engine := FakeEngine(hangs=True)) as channel:
        stub = stub_of(channel)
        call = stub.GenerateBatch(iter(items))
        for ended in range(3):
            await until(lambda: len(engine.requests) >= MAX_IN_FLIGHT + ended)  # noqa: B023 - awaited in the loop
            await stub.Abort(pb.AbortRequest(request_id=str(ended)))
            assert len(engine.requests) <= MAX_IN_FLIGHT + ended + 1
            assert (await call.read()).request_id == str(ended)
        call.cancel()
        await until(lambda: not engine.running)


async def test_an_answer_that_is_too_large_harms_no_other_of_its_batch() -> None:
    large = StepOutput([ChoiceDelta(0, "x" * (4 << 20), [1], finish_reason=FinishReason.LENGTH)])
    async with served(FakeEngine(large)) as channel:
        (answer,) = [answer async for answer in stub_of(channel).GenerateBatch(iter(batch_of(REQUEST)))]
    assert answer.error.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert answer.error.message.startswith(
        "the response to a request of a batch must be at most 4190208 bytes, not 41943"
    )


async def test_one_request_of_a_batch_can_be_aborted() -> None:
    items = batch_of(pb.GenerateRequest(prompt="AB", request_id="a"), pb.GenerateRequest(prompt="AB", request_id="b"))
    async with served(engine := FakeEngine(hangs=True)) as channel:
        stub = stub_of(channel)
        call = stub.GenerateBatch(iter(items))
        await until(lambda: engine.running == 2)
        await stub.Abort(pb.AbortRequest(request_id="b"))
        answer = await call.read()
        assert (answer.request_id, answer.error.code) == ("b", grpc.StatusCode.CANCELLED.value[0])
        assert engine.running == 1
        call.cancel()


async def test_a_message_that_is_none_ends_its_batch_and_what_runs() -> None:
    good = batch_of(REQUEST)[0].SerializeToString()
    async with served(engine := FakeEngine(hangs=True)) as channel:
        method: Any = channel.stream_stream(f"/{NAME}/GenerateBatch")
        call = method(iter([good, b"\xff\xff"]))
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.read()
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert engine.running == 0


def test_every_reason_is_documented() -> None:
    told = {ServiceError.reason, *(error.reason for error in ServiceError.__subclasses__())}
    assert told == set(pb.ErrorReason.values()) - {pb.ERROR_REASON_UNSPECIFIED}
