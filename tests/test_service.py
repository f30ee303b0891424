"""The contract, over a real port, with an engine by hand: statuses, cancellation, streams, health."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from fakes import FakeEngine, last, more
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2
from health_client import health_stub

from yuan_grpc.server.errors import INTERNAL_MESSAGE, OverloadedError, UnavailableError
from yuan_grpc.server.health import Health
from yuan_grpc.server.serve import build
from yuan_grpc.server.service import NAME, YuanService
from yuan_grpc.v1 import yuan_pb2 as pb
from yuan_grpc.v1 import yuan_pb2_grpc

REQUEST = pb.GenerateRequest(prompt="AB")


@asynccontextmanager
async def served(engine: FakeEngine, health: Health | None = None) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a server of this engine's."""
    server, port = await build(YuanService(engine), health or Health(NAME), "127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            yield channel
        finally:
            await server.stop(None)


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
        parts = [part async for part in stub_of(channel).GenerateStream(REQUEST)]
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
    assert "".join(part.choices[0].text for part in parts) == "ABcd"


async def test_a_bad_request_never_reaches_the_engine() -> None:
    engine = FakeEngine(last())
    error, details = await status_from(engine, pb.GenerateRequest(prompt="AB", temperature=-1))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "`temperature` must be between 0 and 2, not -1.0"
    assert details == ["google.rpc.ErrorInfo", "google.rpc.BadRequest"]
    assert engine.asked == []


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
    lines = [line.split(" after")[0] for line in caplog.messages if line.startswith("request")]
    assert lines == ["request 'bad': INVALID_ARGUMENT", "request 'cut': CANCELLED"]


async def test_a_lost_engine_is_unavailable() -> None:
    error, details = await status_from(FakeEngine(UnavailableError("the engine was lost")))
    assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "the engine was lost")
    assert details == ["google.rpc.ErrorInfo"]


async def test_an_engine_that_is_not_ready_is_unavailable() -> None:
    error, _ = await status_from(FakeEngine(last(), ready=False))
    assert error.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_full_queue_says_when_to_try_again() -> None:
    error, details = await status_from(FakeEngine(OverloadedError("the engine's queue is full")))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details == ["google.rpc.ErrorInfo", "google.rpc.RetryInfo"]


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
        assert len(engine.asked) == 1
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


async def test_a_deadline_frees_its_request() -> None:
    engine = FakeEngine(more("a"), hangs=True)
    async with served(engine) as channel:
        call = stub_of(channel).GenerateStream(REQUEST, timeout=0.2)
        assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await engine.freed.wait()


async def test_health_is_true_from_start_to_stop() -> None:
    health = Health(NAME)
    async with served(FakeEngine(), health) as channel:
        watch = health_stub(channel).Watch(health_pb2.HealthCheckRequest(service=NAME))
        seen = [(await watch.read()).status]
        await health.serving()
        seen.append((await watch.read()).status)
        await health.stopping()
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
