"""Starting and stopping, in order, with an engine by hand; the real one's turn is in test_command.py."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import serving
from fake_engine import FakeEngine, last, more
from grpc_health.v1 import health_pb2, health_pb2_grpc
from health_client import health_stub

from yuan_grpc.server.engine.types import EngineRequest, StepOutput
from yuan_grpc.server.server import serve, startup_banner
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
    while not (await call.read()).choices:
        pass
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


class LateEngine(FakeEngine):
    """Answers everybody when it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.may_start.set()
        self.go = asyncio.Event()

    async def generate(
        self, engine_request: EngineRequest, *, stream: bool, deadline: asyncio.Event | None = None
    ) -> AsyncGenerator[StepOutput, None]:
        self.running += 1
        yield StepOutput()
        await self.go.wait()
        yield last("yes")


async def test_what_is_finished_in_the_time_left_is_answered(settings: Settings) -> None:
    engine = LateEngine()
    running = Running(settings, engine)
    while await running.health() != STATUS.SERVING:
        pass
    request = pb.GenerateRequest(prompt="AB")

    async def answer() -> pb.GenerateResponse:
        response: pb.GenerateResponse = await running.stub.Generate(request)
        return response

    async def batch() -> list[pb.GenerateBatchResponse]:
        items = [pb.GenerateBatchRequest(request=request)] * 20
        return [item async for item in running.stub.GenerateBatch(iter(items))]

    calls = [asyncio.ensure_future(answer()) for _ in range(20)]
    answers = asyncio.ensure_future(batch())
    while engine.running < 40:  # noqa: ASYNC110 - the fake engine has no event for it
        await asyncio.sleep(0)
    await running.tell_to_stop()
    while await running.health() != STATUS.NOT_SERVING:
        pass
    engine.go.set()
    assert {response.choices[0].text for response in await asyncio.gather(*calls)} == {"yes"}
    assert [answer.response.choices[0].text for answer in await answers] == ["yes"] * 20
    assert await running.ended() == 0


def called(path: bytes) -> bytes:
    """The bytes of a connection that calls a method."""

    def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
        return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload

    fields = {b":method": b"POST", b":scheme": b"http", b":path": path, b":authority": b"localhost"}
    fields |= {b"content-type": b"application/grpc", b"te": b"trailers"}
    block = b"".join(b"\0%c%b%c%b" % (len(name), name, len(value), value) for name, value in fields.items())
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0) + frame(1, 5, 1, block)


@pytest.mark.parametrize("path", [b"/\xff", b"/yuan.v1.YuanService/\xe4\xb8", b"/yuan.v1.YuanService/Nothing"])
async def test_a_method_that_nobody_has_is_refused_whatever_its_name(path: bytes) -> None:
    async with serving.served(FakeEngine()) as address, grpc.aio.insecure_channel(address) as channel:
        host, _, port = address.partition(":")
        for _ in range(3):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(called(path))
            assert b"grpc-status\x0212" in await reader.readuntil(b"Method not found!")
            writer.close()
        stub: Any = health_pb2_grpc.HealthStub(channel)
        assert (await stub.Check(health_pb2.HealthCheckRequest())).status == STATUS.NOT_SERVING


def test_the_process_ends_for_its_supervisor_when_grpcs_server_does(settings: Settings) -> None:
    """As grpcio's own does at a path that is not UTF-8."""
    program = f"""
import asyncio, os
from fake_engine import FakeEngine
from yuan_grpc.server.grpc import unknown_methods
unknown_methods._NEEDED = ("nothing that it has",), ()
from yuan_grpc.server.server import serve
from yuan_grpc.server.settings import Settings
engine = FakeEngine()
engine.may_start.set()
raise SystemExit(asyncio.run(serve({settings!r}, engine)))
"""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    with (
        subprocess.Popen([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path}) as process,
        grpc.insecure_channel(f"127.0.0.1:{settings.port}") as channel,
    ):
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True)
        try:
            while next(watch).status != STATUS.SERVING:
                pass
            with socket.create_connection(("127.0.0.1", settings.port)) as caller:
                caller.sendall(called(b"/\xff"))
                assert process.wait(timeout=20) == 1
        finally:
            process.kill()  # where it has not ended, nobody waits for it


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
    assert engine.freed_before_stop


async def test_it_can_be_stopped_while_the_engine_starts(settings: Settings) -> None:
    engine = FakeEngine()
    running = Running(settings, engine)
    await running.health()
    await running.tell_to_stop()
    assert await running.ended() == 0
    assert engine.stopped


async def test_an_engine_that_does_not_start_ends_it(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine()
    engine.start_error = RuntimeError("no such weights")
    assert await serve(settings, engine) == 1
    assert engine.stopped
    assert "no such weights" in caplog.text


async def test_an_engine_that_dies_ends_it(settings: Settings) -> None:
    engine = FakeEngine()
    engine.may_start.set()
    running = Running(settings, engine)
    while await running.health() != STATUS.SERVING:
        pass
    engine.died.set()
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
    said = startup_banner(settings)
    assert f"on       127.0.0.1:{settings.port}" in said
    assert "demo" in said
    assert f"http://127.0.0.1:{settings.port}/yuan.v1.YuanService/Generate" in said
    assert "a free port" in startup_banner(replace(settings, port=0))
    assert "http://[::1]:1/" in startup_banner(replace(settings, host="::1", port=1))
