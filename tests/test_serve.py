"""Starting and stopping, in order, with an engine by hand; the real one's turn is in test_command.py."""

import asyncio
import os
import signal
import socket
from dataclasses import replace
from typing import Any

import grpc
import pytest
from fakes import FakeEngine, last, more
from grpc_health.v1 import health_pb2
from health_client import health_stub

from yuan_grpc.server.serve import greeting, serve
from yuan_grpc.server.settings import DEMO, Settings
from yuan_grpc.v1 import yuan_pb2 as pb
from yuan_grpc.v1 import yuan_pb2_grpc

STATUS = health_pb2.HealthCheckResponse


@pytest.fixture
def settings() -> Settings:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return Settings(model=DEMO, host="127.0.0.1", port=port, grace_seconds=3600, engine_flags=())


class Running:
    """A server in this process, and someone watching its health."""

    def __init__(self, settings: Settings, engine: FakeEngine) -> None:
        self.exit_status = asyncio.ensure_future(serve(settings, engine))
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{settings.port}")
        self.stub = yuan_pb2_grpc.YuanServiceStub(self.channel)
        self._watch = health_stub(self.channel).Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True)

    async def health(self) -> int:
        """The next change of health."""
        return int((await self._watch.read()).status)

    async def tell_to_stop(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    async def ended(self) -> int:
        """The exit status. Health is watched to the end, which must not hold the end up."""
        status = await self.exit_status
        await self.channel.close()
        return status


async def with_a_call_in_flight(settings: Settings) -> tuple[Running, FakeEngine, Any]:
    """A server with a stream that has begun and does not end."""
    engine = FakeEngine(more("a"), hangs=True)
    engine.may_start.set()
    running = Running(settings, engine)
    await running.health()
    call = running.stub.GenerateStream(pb.GenerateRequest(prompt="AB"), wait_for_ready=True)
    await call.read()
    return running, engine, call


async def test_it_serves_only_after_the_engine_has_started(settings: Settings) -> None:
    engine = FakeEngine(last("yes"))
    running = Running(settings, engine)
    assert await running.health() == STATUS.NOT_SERVING
    engine.may_start.set()
    assert await running.health() == STATUS.SERVING
    assert (await running.stub.Generate(pb.GenerateRequest(prompt="AB"))).choices[0].text == "yes"
    await running.tell_to_stop()
    assert await running.health() == STATUS.NOT_SERVING
    assert await running.ended() == 0
    assert engine.stopped


async def test_a_call_in_flight_is_finished_before_it_stops(settings: Settings) -> None:
    running, engine, call = await with_a_call_in_flight(settings)
    await running.tell_to_stop()
    while await running.health() != STATUS.NOT_SERVING:
        pass
    assert not engine.stopped
    call.cancel()
    assert await running.ended() == 0


async def test_told_twice_it_does_not_wait_for_calls_in_flight(settings: Settings) -> None:
    running, engine, call = await with_a_call_in_flight(settings)
    await running.tell_to_stop()
    while await running.health() != STATUS.NOT_SERVING:
        pass
    await running.tell_to_stop()
    assert await call.code() is grpc.StatusCode.UNAVAILABLE
    assert await running.ended() == 0
    assert engine.freed.is_set()


async def test_calls_that_outlast_the_grace_are_ended_and_freed(settings: Settings) -> None:
    running, engine, call = await with_a_call_in_flight(replace(settings, grace_seconds=0))
    await running.tell_to_stop()
    assert await call.code() is grpc.StatusCode.UNAVAILABLE
    assert await running.ended() == 0
    assert engine.freed_before_it_stopped


async def test_it_can_be_stopped_while_the_engine_starts(settings: Settings) -> None:
    engine = FakeEngine()
    running = Running(settings, engine)
    await running.health()
    await running.tell_to_stop()
    assert await running.ended() == 0
    assert engine.stopped


async def test_an_engine_that_does_not_start_ends_it(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine()
    engine.failure = RuntimeError("no such weights")
    assert await serve(settings, engine) == 1
    assert engine.stopped
    assert "no such weights" in caplog.text


async def test_an_engine_that_dies_ends_it(settings: Settings) -> None:
    engine = FakeEngine()
    engine.may_start.set()
    running = Running(settings, engine)
    while await running.health() != STATUS.SERVING:
        pass
    engine.dies.set()
    assert await running.health() == STATUS.NOT_SERVING
    assert await running.ended() == 1
    assert engine.stopped


async def test_a_port_that_is_taken_is_said_in_one_line(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", settings.port))
        taken.listen()
        assert await serve(settings, FakeEngine()) == 1
    assert caplog.messages == [
        f"cannot listen on 127.0.0.1:{settings.port}: is it taken, or not an address of this machine?"
    ]


async def test_the_first_lines_say_what_where_and_how(settings: Settings) -> None:
    said = greeting(settings)
    assert f"on       127.0.0.1:{settings.port}" in said
    assert "demo" in said
    assert f"http://127.0.0.1:{settings.port}/yuan.v1.YuanService/Generate" in said
    assert "a free port" in greeting(replace(settings, port=0))
    assert "http://[::1]:1/" in greeting(replace(settings, host="::1", port=1))
