"""The gRPC contract over a real port, with a fake engine: statuses, cancellation, streams and health."""

import asyncio
import gc
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import pytest
from fake_engine import INFO, FakeEngine, last, more
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2
from health_client import health_stub
from servers import serve_grpc

from yuan_grpc.server.core.admission import Admission, Cost, limits_of
from yuan_grpc.server.core.generation_service import GenerationService
from yuan_grpc.server.core.limits import MAX_IN_FLIGHT
from yuan_grpc.server.engine.types import (
    ChoiceDelta,
    EngineRequest,
    FinishReason,
    RankedToken,
    StepOutput,
    TokenLogprobs,
)
from yuan_grpc.server.errors import INTERNAL_MESSAGE, OverloadedError, ServiceError, UnavailableError
from yuan_grpc.server.grpc.health import Health
from yuan_grpc.server.grpc.request_id import send_headers
from yuan_grpc.server.grpc.servicer import NAME
from yuan_grpc.server.grpc.stream_writer import StreamWriter
from yuan_grpc.v1 import yuan_pb2 as pb
from yuan_grpc.v1 import yuan_pb2_grpc

REQUEST = pb.GenerateRequest(prompt="AB")


@asynccontextmanager
async def connect(engine: FakeEngine, health: Health | None = None) -> AsyncIterator[grpc.aio.Channel]:
    """Serve an engine; yield a channel to its server."""
    async with serve_grpc(engine, health) as address, grpc.aio.insecure_channel(address) as channel:
        yield channel


def stub_of(channel: grpc.aio.Channel) -> yuan_pb2_grpc.YuanServiceStub:
    return yuan_pb2_grpc.YuanServiceStub(channel)


async def failed_generate(
    engine: FakeEngine, request: pb.GenerateRequest = REQUEST
) -> tuple[grpc.aio.AioRpcError, list[str]]:
    """Call Generate; return its error and the types of the error's details."""
    async with connect(engine) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub_of(channel).Generate(request)
    trailers = dict(raised.value.trailing_metadata() or ())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    assert (status.code, status.message) == (raised.value.code().value[0], raised.value.details())
    return raised.value, [detail.TypeName() for detail in status.details]


async def test_generate_returns_one_response() -> None:
    async with connect(FakeEngine(last("yes"))) as channel:
        response = await stub_of(channel).Generate(pb.GenerateRequest(prompt="AB", request_id="mine"))
    assert (response.request_id, response.model, response.choices[0].text) == ("mine", "fake", "yes")
    assert response.usage == pb.Usage(prompt_tokens=2, completion_tokens=3)


async def test_a_stream_has_one_message_per_engine_output() -> None:
    async with connect(FakeEngine(more("a"), more("b"), last("c"))) as channel:
        first, *messages = [message async for message in stub_of(channel).GenerateStream(REQUEST)]
    assert (first.usage, len(first.choices)) == (pb.Usage(prompt_tokens=2), 0)
    assert [message.choices[0].text for message in messages] == ["a", "b", "c"]
    assert len({message.request_id for message in messages}) == 1


async def test_the_server_generates_an_absent_request_id() -> None:
    async with connect(FakeEngine(last())) as channel:
        first, second = [await stub_of(channel).Generate(REQUEST) for _ in range(2)]
    assert first.request_id
    assert first.request_id != second.request_id


@pytest.mark.parametrize("as_token_ids", [False, True])
async def test_echo_prepends_the_prompt(as_token_ids: bool) -> None:
    request = pb.GenerateRequest(echo=True)
    if as_token_ids:
        request.prompt_token_ids.ids.extend([65, 66])
    else:
        request.prompt = "AB"
    async with connect(FakeEngine(more("c"), last("d"))) as channel:
        messages = [message async for message in stub_of(channel).GenerateStream(request)]
    assert "".join(choice.text for message in messages for choice in message.choices) == "ABcd"


async def test_an_invalid_request_does_not_reach_the_engine() -> None:
    engine = FakeEngine(last())
    error, details = await failed_generate(engine, pb.GenerateRequest(prompt="AB", temperature=-1))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "`temperature` must be between 0 and 2, not -1.0"
    assert details == ["google.rpc.ErrorInfo", "google.rpc.BadRequest"]
    assert engine.requests == []


@pytest.mark.parametrize("raw", [b"\xff\xff\xff", b"\x0a\x02\xff\xfe"], ids=["invalid message", "invalid UTF-8"])
async def test_a_message_that_cannot_be_parsed_is_an_invalid_argument(
    raw: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with connect(FakeEngine()) as channel:
        call: Any = channel.unary_unary(f"/{NAME}/Generate")
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call(raw)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "UTF-8" in (raised.value.details() or "")
    assert "Traceback" not in caplog.text


async def test_every_call_is_logged_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine(more("a"), hangs=True)
    with caplog.at_level(logging.INFO):
        async with connect(engine) as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await stub_of(channel).Generate(pb.GenerateRequest(request_id="bad"))
            call = stub_of(channel).GenerateStream(pb.GenerateRequest(prompt="AB", request_id="cancelled"))
            await call.read()
            call.cancel()
            await engine.freed.wait()
    lines = [line.split(" after")[0] for line in caplog.messages if line.startswith("Generate")]
    assert lines == ["Generate 'bad': INVALID_ARGUMENT (prompt)", "GenerateStream 'cancelled': CANCELLED"]
    assert all(", peer ipv4:127.0.0.1:" in line for line in caplog.messages if line.startswith("Generate"))
    assert any(", model fake, 2 tokens in, 1 out, first token after " in line for line in caplog.messages)


async def test_a_lost_engine_is_unavailable() -> None:
    error, details = await failed_generate(FakeEngine(UnavailableError("the engine was lost")))
    assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "the engine was lost")
    assert details == ["google.rpc.ErrorInfo"]


async def test_an_engine_that_is_not_ready_is_unavailable() -> None:
    error, _ = await failed_generate(FakeEngine(last(), is_ready=False))
    assert error.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_full_queue_reports_when_to_retry() -> None:
    error, details = await failed_generate(FakeEngine(OverloadedError("the request queue is full (limit 4)")))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details == ["google.rpc.ErrorInfo", "google.rpc.RetryInfo"]
    assert 1000 <= int(dict(error.trailing_metadata() or ())["grpc-retry-pushback-ms"]) <= 2000


async def test_an_unexpected_error_is_logged_but_not_reported_to_the_client(caplog: pytest.LogCaptureFixture) -> None:
    request = pb.GenerateRequest(prompt="AB", request_id="mine")
    with caplog.at_level(logging.ERROR):
        error, _ = await failed_generate(FakeEngine(KeyError("/secret/path")), request)
    assert (error.code(), error.details()) == (grpc.StatusCode.INTERNAL, INTERNAL_MESSAGE)
    assert "mine" in caplog.text
    assert "/secret/path" in caplog.text


async def test_an_error_during_a_stream_ends_it_with_a_status() -> None:
    async with connect(FakeEngine(more("a"), UnavailableError("lost"))) as channel:
        call = stub_of(channel).GenerateStream(REQUEST)
        await call.read()
        assert (await call.read()).choices[0].text == "a"
        with pytest.raises(grpc.aio.AioRpcError, match="lost"):
            await call.read()


async def test_the_request_id_of_a_running_call_is_rejected() -> None:
    engine = FakeEngine(more("a"), hangs=True)
    request = pb.GenerateRequest(prompt="AB", request_id="mine")
    async with connect(engine) as channel:
        running = stub_of(channel).GenerateStream(request)
        await running.read()
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub_of(channel).Generate(request)
        assert raised.value.code() is grpc.StatusCode.ALREADY_EXISTS
        assert len(engine.requests) == 1
        running.cancel()


async def test_a_request_id_belongs_to_its_connection() -> None:
    engine = FakeEngine(more("a"), hangs=True)
    request = pb.GenerateRequest(prompt="AB", request_id="mine")
    option = [("grpc.use_local_subchannel_pool", 1)]  # otherwise both channels would use one connection
    async with (
        serve_grpc(engine) as address,
        grpc.aio.insecure_channel(address) as channel,
        grpc.aio.insecure_channel(address, options=option) as other,
    ):
        calls = [stub_of(one).GenerateStream(request) for one in (channel, other)]
        for call in calls:
            await call.read()
        assert len({engine_request.request_id for engine_request in engine.requests}) == 2
        await stub_of(other).Abort(pb.AbortRequest(request_id="mine"))
        assert await code_of_stream(calls[1]) is grpc.StatusCode.CANCELLED
        assert engine.running == 1
        statuses = [await error_of(stub_of(other).Abort(pb.AbortRequest(request_id=name))) for name in ("mine", "none")]
        assert [code for code, _ in statuses] == [grpc.StatusCode.NOT_FOUND] * 2
        assert statuses[0][1].replace("mine", "none") == statuses[1][1]
        calls[0].cancel()


async def test_a_generated_request_id_is_valid_on_every_connection() -> None:
    engine = FakeEngine(more("a"), hangs=True)
    option = [("grpc.use_local_subchannel_pool", 1)]
    async with (
        serve_grpc(engine) as address,
        grpc.aio.insecure_channel(address) as channel,
        grpc.aio.insecure_channel(address, options=option) as other,
    ):
        call = stub_of(channel).GenerateStream(REQUEST)
        request_id = (await call.read()).request_id
        await stub_of(other).Abort(pb.AbortRequest(request_id=request_id))
        assert await code_of_stream(call) is grpc.StatusCode.CANCELLED


async def code_of_stream(call: Any) -> grpc.StatusCode:
    """Return the code of a stream's error, after its messages."""

    async def read_all() -> None:
        while await call.read() is not grpc.aio.EOF:
            pass

    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await read_all()
    return raised.value.code()


async def error_of(call: Any) -> tuple[grpc.StatusCode, str]:
    """Return the code and the message of the error of a call."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value.code(), raised.value.details() or ""


async def test_a_request_id_can_be_reused_after_its_call() -> None:
    async with connect(FakeEngine(last())) as channel:
        request = pb.GenerateRequest(prompt="AB", request_id="mine")
        for _ in range(2):
            await stub_of(channel).Generate(request)


async def test_a_cancelled_unary_call_frees_its_engine_request() -> None:
    engine = FakeEngine(hangs=True)
    async with connect(engine) as channel:
        call = stub_of(channel).Generate(REQUEST)
        waiting = asyncio.ensure_future(call.code())
        await engine.began.wait()
        call.cancel()
        assert await waiting is grpc.StatusCode.CANCELLED
        await engine.freed.wait()


async def test_a_cancelled_stream_frees_its_engine_request() -> None:
    engine = FakeEngine(more("a"), hangs=True)
    async with connect(engine) as channel:
        call = stub_of(channel).GenerateStream(REQUEST)
        await call.read()
        call.cancel()
        await engine.freed.wait()


async def test_a_cancelled_stream_that_is_not_read_frees_its_engine_request() -> None:
    engine = FakeEngine(*[more("x" * 65536)] * 1000)  # exceeds the HTTP/2 flow-control windows, so the server waits
    async with connect(engine) as channel:
        call = stub_of(channel).GenerateStream(REQUEST)
        await engine.began.wait()
        await call.read()
        assert not engine.freed.is_set()
        call.cancel()
        await engine.freed.wait()


async def test_a_closed_connection_frees_its_engine_request() -> None:
    engine = FakeEngine(more("a"), hangs=True)
    async with connect(engine) as channel:
        call = stub_of(channel).GenerateStream(REQUEST)
        await call.read()
        await channel.close()
        await engine.freed.wait()


async def test_a_write_to_a_disconnected_client_raises_cancelled_error() -> None:
    class DisconnectedContext:
        async def send_initial_metadata(self, metadata: object) -> None: ...

        async def write(self, message: object) -> None:
            raise grpc.aio.InternalError("the call has ended")

    context: Any = DisconnectedContext()
    with pytest.raises(asyncio.CancelledError):
        await StreamWriter(context, lambda: "").write(pb.GenerateStreamResponse())


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_headers_to_a_disconnected_client_raise_cancelled_error_and_are_not_logged(
    is_cancelled: bool, caplog: pytest.LogCaptureFixture
) -> None:
    sending, may_fail = asyncio.Event(), asyncio.Event()

    class DisconnectedContext:
        async def send_initial_metadata(self, metadata: object) -> None:
            sending.set()
            await may_fail.wait()
            raise grpc.aio.InternalError("the call has ended")

    context: Any = DisconnectedContext()
    for send in (send_headers(context, ""), StreamWriter(context, lambda: "").write(pb.GenerateStreamResponse())):
        sending.clear()
        task = asyncio.ensure_future(send)
        await sending.wait()
        if is_cancelled:
            task.cancel()
            await asyncio.sleep(0)
        may_fail.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        may_fail.clear()
    del task, send
    gc.collect()  # asyncio logs a failure that no one has asked for when it is collected
    assert caplog.messages == []


async def test_a_call_past_its_deadline_frees_its_engine_request() -> None:
    engine = FakeEngine(more("a"), hangs=True)
    async with connect(engine) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            [message async for message in stub_of(channel).GenerateStream(REQUEST, timeout=0.2)]
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await engine.freed.wait()


async def test_health_lists_all_services(caplog: pytest.LogCaptureFixture) -> None:
    proto: Any = health_pb2
    async with connect(FakeEngine()) as channel:
        response = await health_stub(channel).List(proto.HealthListRequest())
    serving, status = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    probes = {"startup": status, "readiness": status, "liveness": serving}
    assert {name: health.status for name, health in response.statuses.items()} == {"": status, NAME: status} | probes
    assert caplog.messages == []


class UntouchedEngine(FakeEngine):
    """An engine that gets no prompt, whose tokens have at most eight characters."""

    def __init__(self, limit: int | None = None) -> None:
        super().__init__()
        self.info = replace(INFO, max_token_characters=8, max_num_queued_reqs=limit)

    async def tokenize(self, text: str) -> list[int]:
        raise AssertionError("the prompt was tokenized")

    async def tokenize_with_offsets(self, text: str) -> list[tuple[int, str, int, int]]:
        raise AssertionError("the prompt was tokenized")

    def apply_chat_template(self, turns: Sequence[str]) -> str:
        raise AssertionError("the conversation was joined")


LONG = "A" * (64 * 8 + 1)
TURNS = [pb.Message()] * 1025


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prompt": LONG}, "`prompt` must be at most 512 characters long (the model's context is 64 tokens), not 513"),
        ({"messages": [pb.Message(role="user", content=LONG)]}, "`messages` must be at most 512 characters long"),
        ({"prompt": "A" * 131_073, "truncate_prompt_tokens": 10}, "`prompt` must be at most 131072 characters long"),
        ({"messages": TURNS}, "`messages` must have at most 1024 turns, not 1025"),
        ({"prompt_token_ids": pb.TokenIds(ids=range(65))}, "`prompt_token_ids` must be at most 63 tokens long"),
    ],
    ids=["prompt", "messages", "truncated prompt", "turns", "token ids"],
)
async def test_a_prompt_that_cannot_fit_is_rejected_before_it_is_tokenized(
    request_: dict[str, Any], message: str
) -> None:
    error, _ = await failed_generate(UntouchedEngine(), pb.GenerateRequest(**request_))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (error.details() or "").startswith(message)


async def test_too_many_turns_are_rejected_before_their_texts_are_measured_to_be_tokenized() -> None:
    request = pb.TokenizeRequest(messages=[pb.Message(content="A" * 200)] * 1025)
    async with connect(UntouchedEngine()) as channel:
        code, message = await error_of(stub_of(channel).Tokenize(request))
    assert (code, message) == (grpc.StatusCode.INVALID_ARGUMENT, "`messages` must have at most 1024 turns, not 1025")


async def test_a_call_above_the_limit_is_rejected_before_its_prompt_is_tokenized() -> None:
    engine, admission = UntouchedEngine(limit=4), Admission()
    service = GenerationService(engine, admission)
    with (
        admission.admit("", Cost(3, 3), limits_of(engine.info)),
        pytest.raises(OverloadedError, match=r"the request queue is full \(limit 4\)"),
    ):
        await service.generate(pb.GenerateRequest(prompt="AB", n=2))


@pytest.mark.parametrize("method", ["Generate", "Tokenize"])
async def test_long_texts_are_tokenized_one_at_a_time(method: str) -> None:
    class TokenizingEngine(FakeEngine):
        tokenizing = most = 0

        async def tokenize(self, text: str) -> list[int]:
            self.tokenizing += 1
            self.most = max(self.most, self.tokenizing)
            await asyncio.sleep(0.01)
            self.tokenizing -= 1
            return [65]

        async def tokenize_with_offsets(self, text: str) -> list[tuple[int, str, int, int]]:
            await self.tokenize(text)
            return []

    engine = TokenizingEngine(last())
    make = {"Generate": pb.GenerateRequest, "Tokenize": pb.TokenizeRequest}[method]
    async with connect(engine) as channel:
        call = getattr(stub_of(channel), method)
        await asyncio.gather(*[call(make(prompt="A" * 20_000)) for _ in range(5)])
        assert engine.most == 1
        await asyncio.gather(*[call(make(prompt="A")) for _ in range(5)])
        assert engine.most > 1


async def test_health_watchers_see_every_change() -> None:
    health = Health(NAME)
    async with connect(FakeEngine(), health) as channel:
        watch = health_stub(channel).Watch(health_pb2.HealthCheckRequest(service=NAME))
        seen = [(await watch.read()).status]
        await health.set_serving()
        seen.append((await watch.read()).status)
        await health.set_stopping()
        seen.append((await watch.read()).status)
        watch.cancel()
    status = health_pb2.HealthCheckResponse
    assert seen == [status.NOT_SERVING, status.SERVING, status.NOT_SERVING]


async def test_the_interceptor_leaves_other_services_unchanged() -> None:
    async with connect(FakeEngine()) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await health_stub(channel).Check(health_pb2.HealthCheckRequest(service="unknown"))
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


async def test_error_details_name_the_field() -> None:
    async with connect(FakeEngine()) as channel:
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


async def test_prompt_logprobs_are_sent_before_any_token() -> None:
    prompt_logprobs = TokenLogprobs(RankedToken(65, "A", 0.0, 0), ())
    delta = ChoiceDelta(0, "a", [97], finish_reason=FinishReason.LENGTH)
    engine = FakeEngine(StepOutput([delta], prompt_logprobs=[prompt_logprobs]))
    request = pb.GenerateRequest(prompt="AB", prompt_logprobs=0)
    async with connect(engine) as channel:
        first, *others = [message async for message in stub_of(channel).GenerateStream(request)]
        response = await stub_of(channel).Generate(request)
    assert (len(first.prompt_logprobs), len(first.choices)) == (1, 0)
    assert [message.choices[0].text for message in others] == ["a"]
    assert response.prompt_logprobs == first.prompt_logprobs


async def test_the_response_has_the_seed_that_was_used() -> None:
    async with connect(engine := FakeEngine(last())) as channel:
        stub = stub_of(channel)
        given = await stub.Generate(pb.GenerateRequest(prompt="AB", seed=0))
        drawn = await stub.Generate(REQUEST)
        first = await stub.GenerateStream(REQUEST).read()
        greedy = await stub.Generate(pb.GenerateRequest(prompt="AB", temperature=0, seed=5))
    assert (given.HasField("seed"), given.seed) == (True, 0)
    assert [engine_request.sampling.seed for engine_request in engine.requests] == [0, drawn.seed, first.seed, None]
    assert drawn.seed != first.seed
    assert not greedy.HasField("seed")


async def test_an_idle_stream_sends_heartbeats() -> None:
    request = pb.GenerateRequest(prompt="AB", heartbeat_interval=Duration(nanos=100_000_000))
    async with connect(FakeEngine(hangs=True)) as channel:
        call = stub_of(channel).GenerateStream(request)
        first, *heartbeats = [await call.read() for _ in range(3)]
        call.cancel()
    assert first.HasField("usage")
    assert [(m.model, len(m.choices), m.HasField("usage")) for m in heartbeats] == [("fake", 0, False)] * 2


@pytest.mark.parametrize("best_of", [2, 3])
async def test_partial_on_deadline_returns_partial_output(best_of: int) -> None:
    request = pb.GenerateRequest(prompt="AB", partial_on_deadline=True, n=2, best_of=best_of)
    async with connect(engine := FakeEngine(more("a", 0), last("b", 1, -1.0), hangs=True)) as channel:
        response = await stub_of(channel).Generate(request, timeout=1)
        messages = [message async for message in stub_of(channel).GenerateStream(request, timeout=1)]
    texts: dict[int, str] = {}
    for choice in [choice for message in messages for choice in message.choices]:
        texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert list(texts.values()) == [choice.text for choice in response.choices]
    assert {choice.text for choice in response.choices} == {"a", "b"}
    assert {choice.finish_reason for choice in response.choices} == {
        pb.FINISH_REASON_DEADLINE,
        pb.FINISH_REASON_LENGTH,
    }
    assert engine.running == 0


async def test_messages_are_formatted_with_the_chat_template() -> None:
    messages = [pb.Message(role="user", content="A"), pb.Message(role="assistant", content="B")]
    messages.append(pb.Message(role="user", content="C"))
    async with connect(engine := FakeEngine(last("d"))) as channel:
        response = await stub_of(channel).Generate(pb.GenerateRequest(messages=messages, echo=True))
        tokens = await stub_of(channel).Tokenize(pb.TokenizeRequest(messages=messages))
    assert response.choices[0].text == "A|B|C>d"
    assert (tokens.text, [token.id for token in tokens.tokens]) == ("A|B|C>", list(engine.requests[0].prompt))


async def test_a_truncated_prompt_is_echoed_and_counted_truncated() -> None:
    request = pb.GenerateRequest(prompt="ABC", truncate_prompt_tokens=2, echo=True, return_prompt_token_ids=True)
    async with connect(FakeEngine(last("d"))) as channel:
        response = await stub_of(channel).Generate(request)
    assert response.choices[0].text == "BCd"
    assert (response.usage.prompt_tokens, list(response.prompt_token_ids)) == (2, [66, 67])


async def test_tokens_have_offsets_and_detokenize_to_the_text() -> None:
    async with connect(FakeEngine()) as channel:
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
    ids=[
        "no text",
        "invalid token",
        "no request id",
        "not running",
        "not loaded",
        "unknown model",
        "priority disabled",
    ],
)
async def test_each_rpc_reports_invalid_requests(method: str, request_: Any, code: grpc.StatusCode) -> None:
    async with connect(FakeEngine()) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await getattr(stub_of(channel), method)(request_)
    assert raised.value.code() is code


async def test_get_model_returns_limits_and_adapters() -> None:
    async with connect(FakeEngine()) as channel:
        stub = stub_of(channel)
        await stub.LoadLora(pb.LoadLoraRequest(name="style"))
        model = await stub.GetModel(pb.GetModelRequest())
        listed = await stub.ListLoras(pb.ListLorasRequest())
        await stub.UnloadLora(pb.UnloadLoraRequest(name="style"))
        assert not (await stub.ListLoras(pb.ListLorasRequest())).loras
    assert (model.name, model.limits.max_model_len, model.limits.HasField("max_num_queued_reqs")) == ("fake", 64, False)
    assert (list(model.lora.loaded), [lora.name for lora in listed.loras]) == (["style"], ["style"])


@pytest.mark.parametrize("stream", [False, True])
async def test_an_aborted_call_is_cancelled_and_frees_its_engine_request(stream: bool) -> None:
    request = pb.GenerateRequest(prompt="AB", request_id="mine")
    async with connect(engine := FakeEngine(more("a"), hangs=True)) as channel:
        stub = stub_of(channel)

        async def call() -> None:
            if stream:
                [message async for message in stub.GenerateStream(request)]
            else:
                await stub.Generate(request)

        running = asyncio.ensure_future(call())
        await engine.began.wait()
        await stub.Abort(pb.AbortRequest(request_id="mine"))
        assert engine.running == 0
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await running
    assert raised.value.code() is grpc.StatusCode.CANCELLED
    trailers = dict(raised.value.trailing_metadata() or ())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.reason == "ABORTED"


async def test_a_stream_that_is_not_read_can_be_aborted() -> None:
    engine = FakeEngine(*[more("x" * 65536)] * 1000)
    async with connect(engine) as channel:
        stub = stub_of(channel)
        call = stub.GenerateStream(pb.GenerateRequest(prompt="AB", request_id="mine"))
        await engine.began.wait()
        await stub.Abort(pb.AbortRequest(request_id="mine"))
        assert engine.running == 0
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            [message async for message in call]
        assert raised.value.code() is grpc.StatusCode.CANCELLED


async def wait_until(condition: Callable[[], bool]) -> None:
    """Return when the condition is true; the test's timeout is the limit."""
    while not condition():  # noqa: ASYNC110 - the fake engine has no event for it
        await asyncio.sleep(0)


def batch_items(*requests: pb.GenerateRequest) -> list[pb.GenerateBatchRequest]:
    return [pb.GenerateBatchRequest(request=request) for request in requests]


async def test_a_batch_returns_a_response_or_a_status_for_each_request() -> None:
    items = batch_items(
        REQUEST, pb.GenerateRequest(prompt="AB", n=0), pb.GenerateRequest(prompt="AB", request_id="mine")
    )
    items.append(pb.GenerateBatchRequest())
    async with connect(FakeEngine(last("yes"))) as channel:
        results = [result async for result in stub_of(channel).GenerateBatch(iter(items))]
    by_index = {result.index: result for result in results}
    assert [by_index[i].WhichOneof("result") for i in range(4)] == ["response", "error", "response", "error"]
    assert by_index[2].request_id == by_index[2].response.request_id == "mine"
    status = status_pb2.Status.FromString(by_index[1].error.SerializeToString())
    assert (status.code, status.message) == (3, "`n` must be between 1 and 128, not 0")
    assert status.details[1].Is(error_details_pb2.BadRequest.DESCRIPTOR)


async def test_a_batch_runs_a_limited_number_of_requests_at_a_time() -> None:
    items = batch_items(*[pb.GenerateRequest(prompt="AB", request_id=str(i)) for i in range(MAX_IN_FLIGHT + 10)])
    async with connect(engine := FakeEngine(hangs=True)) as channel:
        stub = stub_of(channel)
        call = stub.GenerateBatch(iter(items))
        for ended in range(3):
            await wait_until(lambda: len(engine.requests) >= MAX_IN_FLIGHT + ended)  # noqa: B023 - awaited in the loop
            await stub.Abort(pb.AbortRequest(request_id=str(ended)))
            assert len(engine.requests) <= MAX_IN_FLIGHT + ended + 1
            assert (await call.read()).request_id == str(ended)
        call.cancel()
        await wait_until(lambda: not engine.running)


@pytest.mark.parametrize(
    ("fields", "running"),
    [({"n": 16}, 4), ({"n": 1, "best_of": 32}, 2), ({"n": 16, "temperature": 0}, 64), ({"n": 128}, 1)],
    ids=["choices", "candidates", "identical choices", "more than all"],
)
async def test_the_choices_of_a_batch_share_its_limit(fields: dict[str, Any], running: int) -> None:
    items = batch_items(*[pb.GenerateRequest(prompt="AB", request_id=str(i), **fields) for i in range(70)])
    async with connect(engine := FakeEngine(hangs=True)) as channel:
        stub = stub_of(channel)
        call = stub.GenerateBatch(iter(items))
        await wait_until(lambda: len(engine.requests) == running)
        await stub.Abort(pb.AbortRequest(request_id="0"))
        assert (await call.read()).request_id == "0"
        await wait_until(lambda: len(engine.requests) == running + 1)
        assert engine.running == running
        call.cancel()
        await wait_until(lambda: not engine.running)


async def test_a_too_large_response_fails_alone_in_its_batch() -> None:
    large = StepOutput([ChoiceDelta(0, "x" * (4 << 20), [1], finish_reason=FinishReason.LENGTH)])
    async with connect(FakeEngine(large)) as channel:
        (result,) = [result async for result in stub_of(channel).GenerateBatch(iter(batch_items(REQUEST)))]
    assert result.error.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert result.error.message.startswith(
        "the response to a request of a batch must be at most 4190208 bytes, not 41943"
    )


async def test_one_request_of_a_batch_can_be_aborted() -> None:
    items = batch_items(
        pb.GenerateRequest(prompt="AB", request_id="a"), pb.GenerateRequest(prompt="AB", request_id="b")
    )
    async with connect(engine := FakeEngine(hangs=True)) as channel:
        stub = stub_of(channel)
        call = stub.GenerateBatch(iter(items))
        await wait_until(lambda: engine.running == 2)
        await stub.Abort(pb.AbortRequest(request_id="b"))
        result = await call.read()
        assert (result.request_id, result.error.code) == ("b", grpc.StatusCode.CANCELLED.value[0])
        assert engine.running == 1
        call.cancel()


async def test_an_invalid_message_ends_its_batch_and_running_requests() -> None:
    good = batch_items(REQUEST)[0].SerializeToString()
    async with connect(engine := FakeEngine(hangs=True)) as channel:
        method: Any = channel.stream_stream(f"/{NAME}/GenerateBatch")
        call = method(iter([good, b"\xff\xff"]))
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.read()
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert engine.running == 0


def test_every_error_reason_of_the_contract_is_used() -> None:
    reasons = {ServiceError.reason, *(error.reason for error in ServiceError.__subclasses__())}
    assert reasons == set(pb.ErrorReason.values()) - {pb.ERROR_REASON_UNSPECIFIED}


class PausingEngine(FakeEngine):
    """An engine that lets other requests start between two outputs."""

    async def generate(
        self, request: EngineRequest, *, stream: bool, deadline: asyncio.Event | None = None
    ) -> AsyncGenerator[StepOutput, None]:
        async for output in super().generate(request, stream=stream, deadline=deadline):
            yield output
            for _ in range(100):
                await asyncio.sleep(0)


async def test_a_batch_larger_than_the_queue_is_fed_through_it() -> None:
    engine = PausingEngine(more("a"), last("b"))
    engine.info = replace(INFO, max_num_queued_reqs=3)
    items = [pb.GenerateBatchRequest(request=pb.GenerateRequest(prompt="A", n=1 + index % 2)) for index in range(20)]
    async with connect(engine) as channel:
        results = [result async for result in stub_of(channel).GenerateBatch(iter(items))]
    assert {result.WhichOneof("result") for result in results} == {"response"}
    assert sorted(result.index for result in results) == list(range(20))


async def test_the_trace_of_the_caller_is_passed_to_the_engine() -> None:
    trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "a=b"}
    metadata = [*trace.items(), ("other", "c")]
    engine = FakeEngine(last("b"))
    async with connect(engine) as channel:
        stub = stub_of(channel)
        await stub.Generate(REQUEST, metadata=metadata)
        [message async for message in stub.GenerateStream(REQUEST, metadata=metadata)]
        [result async for result in stub.GenerateBatch(iter(batch_items(REQUEST)), metadata=metadata)]
        await stub.Generate(REQUEST)
    assert [request.trace_headers for request in engine.requests] == [trace, trace, trace, {}]
