"""Probes, a stalled engine, and the withdrawal before a stop, with a real server and a fake engine."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import httpx
import pytest
from fake_engine import FakeEngine, last
from grpc_health.v1 import health_pb2
from health_client import health_stub
from ports import free_port

from yuan_grpc.server.server import serve
from yuan_grpc.server.settings import DEMO, Settings
from yuan_grpc.server.settings.lifecycle import LifecycleSettings
from yuan_grpc.v1 import yuan_pb2 as pb
from yuan_grpc.v1 import yuan_pb2_grpc

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
PROBES = ("startup", "readiness", "liveness")
REQUEST = pb.GenerateRequest(prompt="AB")


@pytest.fixture
def settings() -> Settings:
    return Settings(DEMO, "127.0.0.1", free_port(), 3600, ())


class Server:
    """A server in this process."""

    def __init__(self, settings: Settings, engine: FakeEngine, channel: grpc.aio.Channel) -> None:
        self.exit_status = asyncio.ensure_future(serve(settings, engine))
        self.stub: Any = yuan_pb2_grpc.YuanServiceStub(channel)
        self._health = health_stub(channel)

    async def probes(self) -> list[int]:
        """Return the status of startup, readiness and liveness."""
        requests = [health_pb2.HealthCheckRequest(service=name) for name in PROBES]
        return [(await self._health.Check(request, wait_for_ready=True)).status for request in requests]

    async def wait_for(self, status: int, service: str = "readiness") -> None:
        """Return when a service has a status."""
        watch = self._health.Watch(health_pb2.HealthCheckRequest(service=service), wait_for_ready=True)
        while (await watch.read()).status != status:
            pass
        watch.cancel()

    def send_sigterm(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


@asynccontextmanager
async def run_server(settings: Settings, engine: FakeEngine) -> AsyncIterator[Server]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{settings.port}") as channel:
        server = Server(settings, engine, channel)
        try:
            yield server
        finally:
            if not server.exit_status.done():
                server.send_sigterm()
                await server.exit_status


async def test_startup_readiness_and_liveness_differ(settings: Settings) -> None:
    engine = FakeEngine(last("a"))
    http_port = free_port()
    settings = replace(settings, http_port=http_port, lifecycle=LifecycleSettings(withdraw_seconds=3600))
    async with run_server(settings, engine) as server, httpx.AsyncClient(trust_env=False) as client:
        assert await server.probes() == [NOT_SERVING, NOT_SERVING, SERVING]
        engine.may_start.set()
        await server.wait_for(SERVING)
        assert await server.probes() == [SERVING, SERVING, SERVING]
        assert (await client.get(f"http://127.0.0.1:{http_port}/health")).status_code == 200
        server.send_sigterm()
        await server.wait_for(NOT_SERVING)
        assert await server.probes() == [SERVING, NOT_SERVING, SERVING]
        assert (await client.get(f"http://127.0.0.1:{http_port}/health")).status_code == 503
        assert (await server.stub.Generate(REQUEST)).choices[0].text == "a"  # new calls are served still
        server.send_sigterm()  # ends the withdrawal
        assert await server.exit_status == 0


async def test_a_stalled_engine_is_not_serving_until_it_makes_progress(settings: Settings) -> None:
    engine = FakeEngine(hangs=True)
    engine.may_start.set()
    settings = replace(settings, grace_seconds=0, lifecycle=LifecycleSettings(stall_seconds=0.05))
    async with run_server(settings, engine) as server:
        await server.wait_for(SERVING)
        running = server.stub.Generate(REQUEST)
        await server.wait_for(NOT_SERVING)
        assert await server.probes() == [SERVING, NOT_SERVING, NOT_SERVING]
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await server.stub.Generate(REQUEST)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        assert raised.value.details() == "the engine makes no progress"
        engine.progress += 1
        await server.wait_for(SERVING)
        running.cancel()
        await engine.freed.wait()


async def test_a_server_with_a_long_stall_exits_with_a_failure(settings: Settings) -> None:
    engine = FakeEngine(hangs=True)
    engine.may_start.set()
    lifecycle = LifecycleSettings(stall_seconds=0.05, stall_exit_seconds=0)
    async with run_server(replace(settings, lifecycle=lifecycle), engine) as server:
        await server.wait_for(SERVING)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await server.stub.Generate(REQUEST)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        assert await server.exit_status == 1
    assert engine.stopped


async def test_an_engine_that_dies_while_the_last_calls_run_is_a_failure(settings: Settings) -> None:
    engine = FakeEngine(hangs=True)
    engine.may_start.set()
    async with run_server(settings, engine) as server:
        await server.wait_for(SERVING)
        call = server.stub.GenerateStream(REQUEST)
        await call.read()
        server.send_sigterm()
        await server.wait_for(NOT_SERVING)
        engine.is_ready = False
        call.cancel()
        assert await server.exit_status == 1


async def test_an_engine_that_dies_ends_the_withdrawal(settings: Settings) -> None:
    engine = FakeEngine(last("a"))
    engine.may_start.set()
    settings = replace(settings, lifecycle=LifecycleSettings(withdraw_seconds=3600))
    async with run_server(settings, engine) as server:
        await server.wait_for(SERVING)
        server.send_sigterm()
        await server.wait_for(NOT_SERVING)
        engine.is_ready = False
        engine.died.set()
        assert await server.exit_status == 1
