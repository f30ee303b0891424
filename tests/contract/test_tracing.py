"""Spans of calls, received by a collector over OTLP, with a real server and a fake engine."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import httpx
import pytest
from fake_engine import FakeEngine, last, more
from grpc_health.v1 import health_pb2
from health_client import health_stub
from otlp_collector import Span, collect_spans
from ports import free_port

from yuan_grpc.server.server import serve
from yuan_grpc.server.settings import DEMO, Settings
from yuan_grpc.server.settings.telemetry import TelemetrySettings
from yuan_grpc.v1 import yuan_pb2 as pb
from yuan_grpc.v1 import yuan_pb2_grpc

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACE = [("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01")]
REQUEST = pb.GenerateRequest(prompt="AB", request_id="mine")
SERVER, ERROR = 2, 2


async def traced(engine: FakeEngine, use: Callable[[Any, int], Awaitable[None]]) -> list[Span]:
    """Return the spans of what a function does with a stub and an HTTP port."""
    engine.may_start.set()
    port, http_port = free_port(), free_port()
    with collect_spans() as (endpoint, spans):
        telemetry = TelemetrySettings(otlp_traces_endpoint=endpoint)
        settings = Settings(DEMO, "127.0.0.1", port, 0, (), http_port=http_port, telemetry=telemetry)
        status = asyncio.ensure_future(serve(settings, engine))
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            watch = health_stub(channel).Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True)
            while (await watch.read()).status != health_pb2.HealthCheckResponse.SERVING:
                pass
            await use(yuan_pb2_grpc.YuanServiceStub(channel), http_port)
            os.kill(os.getpid(), signal.SIGTERM)
            assert await status == 0
    return spans


async def test_the_span_of_a_call_continues_the_callers_trace_into_the_engine() -> None:
    engine = FakeEngine(more("a"), last("b"))

    async def use(stub: Any, _: int) -> None:
        async for _ in stub.GenerateStream(REQUEST, metadata=TRACE):
            pass

    (span,) = await traced(engine, use)
    assert (span.name, span.kind) == ("yuan.v1.YuanService/GenerateStream", SERVER)
    assert (span.trace_id, span.parent_id) == (TRACE_ID, PARENT_ID)
    assert engine.requests[0].trace_headers == {"traceparent": f"00-{TRACE_ID}-{span.span_id}-01"}
    assert span.fields["rpc.method"] == "GenerateStream"
    assert span.fields["rpc.grpc.status_code"] == 0
    assert span.fields["gen_ai.response.id"] == "mine"
    assert span.fields["gen_ai.response.model"] == "fake"
    assert (span.fields["gen_ai.usage.input_tokens"], span.fields["gen_ai.usage.output_tokens"]) == (2, 2)
    assert span.resource["service.name"] == "yuan-grpc"
    assert not any("AB" in str(value) for value in span.fields.values())


async def test_a_call_without_a_trace_starts_one_and_a_rejection_is_no_error_of_the_server() -> None:
    async def use(stub: Any, _: int) -> None:
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Generate(pb.GenerateRequest())

    (span,) = await traced(FakeEngine(), use)
    assert len(span.trace_id) == 32
    assert (span.parent_id, span.status) == ("", 0)
    assert span.fields["error.type"] == "INVALID_REQUEST"


async def test_an_internal_error_is_an_error() -> None:
    async def use(stub: Any, _: int) -> None:
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Generate(REQUEST)

    (span,) = await traced(FakeEngine(RuntimeError("broken")), use)
    assert span.status == ERROR
    assert not any("broken" in str(value) for value in span.fields.values())


async def test_requests_of_a_batch_are_children_of_its_span() -> None:
    async def use(stub: Any, _: int) -> None:
        items = [pb.GenerateBatchRequest(request=pb.GenerateRequest(prompt="AB"))] * 2
        assert len([result async for result in stub.GenerateBatch(iter(items), metadata=TRACE)]) == 2

    *requests, batch = await traced(FakeEngine(last("a")), use)
    assert (batch.name, batch.parent_id) == ("yuan.v1.YuanService/GenerateBatch", PARENT_ID)
    assert [span.parent_id for span in requests] == [batch.span_id] * 2
    assert {span.name for span in requests} == {"yuan.v1.YuanService/GenerateBatch.request"}


async def test_calls_over_http_have_spans_too() -> None:
    async def use(_: Any, port: int) -> None:
        async with httpx.AsyncClient(trust_env=False) as client:
            body = {"prompt": "AB", "max_tokens": 4}
            await client.post(f"http://127.0.0.1:{port}/v1/completions", json=body, headers=dict(TRACE))

    (span,) = await traced(FakeEngine(last("a")), use)
    assert (span.name, span.trace_id, span.parent_id) == ("POST /v1/completions", TRACE_ID, PARENT_ID)
    assert span.fields["http.route"] == "/v1/completions"
