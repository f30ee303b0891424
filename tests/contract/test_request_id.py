"""`x-request-id` in the metadata of calls, and the times of a request, with a real server and a fake engine."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import pytest
from fake_engine import FakeEngine, last, more
from servers import serve_grpc

from yuan_grpc.client import AsyncClient
from yuan_grpc.v1 import yuan_pb2 as pb
from yuan_grpc.v1 import yuan_pb2_grpc

REQUEST = pb.GenerateRequest(prompt="AB")
RANDOM_IDS = ["0af76519-16cd-43dd-8448-eb211c80319c", "0af76519-16cd-93dd-8448-eb211c80319c", "0af7651916cd43dd" * 2]


@asynccontextmanager
async def stubs(engine: FakeEngine, count: int = 1) -> AsyncIterator[list[Any]]:
    """Serve an engine; yield clients with a connection each."""
    async with serve_grpc(engine) as address:
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [grpc.aio.insecure_channel(address, options) for _ in range(count)]
        yield [yuan_pb2_grpc.YuanServiceStub(channel) for channel in channels]
        for channel in channels:
            await channel.close()


async def id_in_headers(call: Any) -> str | None:
    metadata = dict(await call.initial_metadata())
    return metadata.get("x-request-id")


async def test_the_id_in_the_metadata_is_that_of_the_request_and_is_sent_back() -> None:
    metadata = [("x-request-id", "from-proxy")]
    async with stubs(FakeEngine(last("a"))) as (stub,):
        call = stub.Generate(REQUEST, metadata=metadata)
        assert (await call).request_id == "from-proxy"
        assert await id_in_headers(call) == "from-proxy"
        stream = stub.GenerateStream(REQUEST, metadata=metadata)
        assert {message.request_id async for message in stream} == {"from-proxy"}
        assert await id_in_headers(stream) == "from-proxy"
        model = stub.GetModel(pb.GetModelRequest(), metadata=metadata)
        await model
        assert await id_in_headers(model) == "from-proxy"


async def test_the_id_of_the_message_takes_precedence_and_others_are_generated() -> None:
    async with stubs(FakeEngine(last("a"))) as (stub,):
        request = pb.GenerateRequest(prompt="AB", request_id="mine")
        call = stub.Generate(request, metadata=[("x-request-id", "from-proxy")])
        assert ((await call).request_id, await id_in_headers(call)) == ("mine", "mine")
        call = stub.Generate(REQUEST)
        assert (await call).request_id == await id_in_headers(call)
        call = stub.Generate(REQUEST, metadata=[("x-request-id", "a" * 257)])
        assert len((await call).request_id) == 32


async def test_a_rejected_call_has_the_id_in_its_trailers_and_its_log_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        async with stubs(FakeEngine()) as (stub,):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stub.Tokenize(pb.TokenizeRequest(), metadata=[("x-request-id", "from-proxy")])
    assert ("x-request-id", "from-proxy") in list(raised.value.trailing_metadata())
    assert any(line.startswith("Tokenize 'from-proxy': INVALID_ARGUMENT") for line in caplog.messages)


async def test_calls_with_the_same_id_in_their_metadata_do_not_exclude_each_other() -> None:
    engine, metadata = FakeEngine(more("a"), hangs=True), [("x-request-id", "retried")]
    async with stubs(engine) as (stub,):
        calls = [stub.GenerateStream(REQUEST, metadata=metadata) for _ in range(2)]
        assert [(await call.read()).request_id for call in calls] == ["retried", "retried"]
        for call in calls:
            call.cancel()


@pytest.mark.parametrize("request_id", RANDOM_IDS)
async def test_a_random_id_is_valid_on_all_connections(request_id: str) -> None:
    async with stubs(FakeEngine(more("a"), hangs=True), count=2) as (first, second):
        call = first.GenerateStream(REQUEST, metadata=[("x-request-id", request_id)])
        await call.read()
        await second.Abort(pb.AbortRequest(request_id=request_id))


async def test_any_other_id_is_valid_on_its_connection() -> None:
    async with stubs(FakeEngine(more("a"), hangs=True), count=2) as (first, second):
        call = first.GenerateStream(REQUEST, metadata=[("x-request-id", "1")])
        await call.read()
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await second.Abort(pb.AbortRequest(request_id="1"))
        assert raised.value.code() is grpc.StatusCode.NOT_FOUND
        await first.Abort(pb.AbortRequest(request_id="1"))


TIMED = [replace(more("a"), queue_seconds=0.5, prefill_seconds=0.25, first_token_seconds=1.0), last("b")]


async def test_times_are_returned_if_requested() -> None:
    async with stubs(FakeEngine(*TIMED)) as (stub,):
        assert not (await stub.Generate(REQUEST)).HasField("timings")
        request = pb.GenerateRequest(prompt="AB", return_timings=True)
        timings = (await stub.Generate(request)).timings
        messages = [message async for message in stub.GenerateStream(request)]
    assert (timings.queue.ToMilliseconds(), timings.prefill.ToMilliseconds()) == (500, 250)
    assert timings.first_token.ToMilliseconds() >= 1000
    assert timings.total.ToNanoseconds() > 0
    assert [message.HasField("timings") for message in messages] == [False, False, True]
    assert messages[-1].timings.queue == timings.queue


async def test_times_that_the_engine_does_not_know_are_absent() -> None:
    async with stubs(FakeEngine(last("b"))) as (stub,):
        timings = (await stub.Generate(pb.GenerateRequest(prompt="AB", return_timings=True))).timings
    assert not timings.HasField("queue")
    assert timings.HasField("first_token")
    assert timings.HasField("decode")


async def test_the_python_client_has_the_times_in_seconds() -> None:
    async with serve_grpc(FakeEngine(*TIMED)) as address, AsyncClient(address) as client:
        completion = await client.generate("AB", return_timings=True)
        stream = client.stream("AB", return_timings=True)
        assert "".join([delta async for delta in stream]) == "ab"
        without = await client.generate("AB")
    assert completion.timings is not None
    assert (completion.timings.queue, completion.timings.prefill) == (0.5, 0.25)
    assert stream.completion.timings is not None
    assert stream.completion.timings.queue == 0.5
    assert without.timings is None
