"""Startup and shutdown in order, with a fake engine. The real engine is tested in test_serve_command.py."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from certificates import Authority
from fake_engine import FakeEngine, last, more
from grpc_health.v1 import health_pb2, health_pb2_grpc
from health_client import health_stub
from servers import serve_grpc

from yuan_grpc.server import server
from yuan_grpc.server.core.inflight import InflightRequests
from yuan_grpc.server.engine.types import EngineRequest, StepOutput
from yuan_grpc.server.server import seconds_since_command, serve, startup_banner
from yuan_grpc.server.settings import DEMO, Settings
from yuan_grpc.server.settings.demo import LOAD_TEST
from yuan_grpc.server.settings.grpc_port import GrpcSettings
from yuan_grpc.server.settings.security import SecuritySettings
from yuan_grpc.server.start_error import StartError
from yuan_grpc.v1 import yuan_pb2 as pb
from yuan_grpc.v1 import yuan_pb2_grpc

STATUS = health_pb2.HealthCheckResponse


@pytest.fixture
def settings() -> Settings:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    return Settings(model=DEMO, host="127.0.0.1", port=port, grace_seconds=3600, engine_flags=())


class RunningServer:
    """A server in this process, and a watch of its health."""

    def __init__(self, settings: Settings, engine: FakeEngine) -> None:
        self.exit_status = asyncio.ensure_future(serve(settings, engine))
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{settings.port}")
        self.stub = yuan_pb2_grpc.YuanServiceStub(self.channel)
        self._watch = health_stub(self.channel).Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True)

    async def next_health(self) -> int:
        """Return the next change of health."""
        return int((await self._watch.read()).status)

    async def send_sigterm(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    async def wait_for_exit(self) -> int:
        """Return the exit status. The health watch stays open until then and must not delay the shutdown."""
        status = await self.exit_status
        await self.channel.close()
        return status


async def start_with_running_stream(settings: Settings) -> tuple[RunningServer, FakeEngine, Any]:
    """Return a server, its engine, and a stream that has started and does not end."""
    engine = FakeEngine(more("a"), hangs=True)
    engine.may_start.set()
    server = RunningServer(settings, engine)
    await server.next_health()
    stream = server.stub.GenerateStream(pb.GenerateRequest(prompt="AB"), wait_for_ready=True)
    while not (await stream.read()).choices:
        pass
    return server, engine, stream


async def test_health_is_serving_only_after_the_engine_has_started(settings: Settings) -> None:
    engine = FakeEngine(last("yes"))
    server = RunningServer(settings, engine)
    assert await server.next_health() == STATUS.NOT_SERVING
    engine.may_start.set()
    assert await server.next_health() == STATUS.SERVING
    assert (await server.stub.Generate(pb.GenerateRequest(prompt="AB"))).choices[0].text == "yes"
    await server.send_sigterm()
    assert await server.next_health() == STATUS.NOT_SERVING
    assert await server.wait_for_exit() == 0
    assert engine.stopped


async def test_the_server_waits_for_running_calls_before_it_stops(settings: Settings) -> None:
    server, engine, stream = await start_with_running_stream(settings)
    await server.send_sigterm()
    while await server.next_health() != STATUS.NOT_SERVING:
        pass
    assert not engine.stopped
    stream.cancel()
    assert await server.wait_for_exit() == 0


async def test_the_unix_socket_and_tls_stop_with_the_server(settings: Settings, tmp_path: Path) -> None:
    """A client of the socket watches health. Both listeners answer, and both end their connections."""
    authority = Authority()
    certificate, key = authority.write(tmp_path)
    security = SecuritySettings(tls_cert_file=certificate, tls_key_file=key)
    settings = replace(settings, security=security, grpc=GrpcSettings(unix_socket=tmp_path / "socket"))
    engine = FakeEngine(last("yes"))
    engine.may_start.set()
    server = asyncio.ensure_future(serve(settings, engine))
    async with (
        grpc.aio.insecure_channel(f"unix:{tmp_path}/socket") as local,
        grpc.aio.secure_channel(f"127.0.0.1:{settings.port}", grpc.ssl_channel_credentials(authority.pem)) as secure,
    ):
        watch = health_stub(local).Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True)
        while (await watch.read()).status != STATUS.SERVING:
            pass
        for channel in (local, secure):
            stub = yuan_pb2_grpc.YuanServiceStub(channel)
            response = await stub.Generate(pb.GenerateRequest(prompt="AB"), wait_for_ready=True)
            assert response.choices[0].text == "yes"
        os.kill(os.getpid(), signal.SIGTERM)
        assert await server == 0
    assert engine.stopped


async def test_a_certificate_that_cannot_be_read_stops_the_start(settings: Settings, tmp_path: Path) -> None:
    security = SecuritySettings(tls_cert_file=tmp_path / "none.pem", tls_key_file=tmp_path / "none.key")
    with pytest.raises(StartError, match="--tls-cert-file must be a file that this user can read"):
        await serve(replace(settings, security=security), FakeEngine())


async def test_only_a_server_with_a_recent_call_waits_long_for_its_responses(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    inflight = InflightRequests()
    monkeypatch.setattr(asyncio, "sleep", sleep)
    await server._wait_until_quiet(inflight)
    assert slept == [server.SHORT_FLUSH_SECONDS]
    monkeypatch.setattr(server, "FLUSH_SECONDS", 3600)
    with inflight.track_unnamed():
        pass
    await server._wait_until_quiet(inflight)
    assert slept[1] > 1800


class WaitingEngine(FakeEngine):
    """An engine that finishes all requests when `may_finish` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.may_start.set()
        self.may_finish = asyncio.Event()

    async def generate(
        self, engine_request: EngineRequest, *, stream: bool, deadline: asyncio.Event | None = None
    ) -> AsyncGenerator[StepOutput, None]:
        self.running += 1
        yield StepOutput()
        await self.may_finish.wait()
        yield last("yes")


async def test_calls_that_finish_within_the_grace_period_get_their_responses(settings: Settings) -> None:
    engine = WaitingEngine()
    server = RunningServer(settings, engine)
    while await server.next_health() != STATUS.SERVING:
        pass
    request = pb.GenerateRequest(prompt="AB")

    async def generate() -> pb.GenerateResponse:
        response: pb.GenerateResponse = await server.stub.Generate(request)
        return response

    async def generate_batch() -> list[pb.GenerateBatchResponse]:
        items = [pb.GenerateBatchRequest(request=request)] * 20
        return [result async for result in server.stub.GenerateBatch(iter(items))]

    calls = [asyncio.ensure_future(generate()) for _ in range(20)]
    batch = asyncio.ensure_future(generate_batch())
    while engine.running < 40:  # noqa: ASYNC110 - the fake engine has no event for it
        await asyncio.sleep(0)
    await server.send_sigterm()
    while await server.next_health() != STATUS.NOT_SERVING:
        pass
    engine.may_finish.set()
    assert {response.choices[0].text for response in await asyncio.gather(*calls)} == {"yes"}
    assert [result.response.choices[0].text for result in await batch] == ["yes"] * 20
    assert await server.wait_for_exit() == 0


def encode_call(path: bytes) -> bytes:
    """Return the bytes of an HTTP/2 connection that calls a method."""

    def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
        return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload

    fields = {b":method": b"POST", b":scheme": b"http", b":path": path, b":authority": b"localhost"}
    fields |= {b"content-type": b"application/grpc", b"te": b"trailers"}
    block = b"".join(b"\0%c%b%c%b" % (len(name), name, len(value), value) for name, value in fields.items())
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0) + frame(1, 5, 1, block)


@pytest.mark.parametrize("path", [b"/\xff", b"/yuan.v1.YuanService/\xe4\xb8", b"/yuan.v1.YuanService/Nothing"])
async def test_an_unknown_method_is_rejected_and_the_server_continues(path: bytes) -> None:
    async with serve_grpc(FakeEngine()) as address, grpc.aio.insecure_channel(address) as channel:
        host, _, port = address.partition(":")
        for _ in range(3):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(encode_call(path))
            assert b"grpc-status\x0212" in await reader.readuntil(b"Method not found!")
            writer.close()
        stub: Any = health_pb2_grpc.HealthStub(channel)
        assert (await stub.Check(health_pb2.HealthCheckRequest())).status == STATUS.NOT_SERVING


@pytest.mark.timeout(60)
def test_grpcio_still_stops_at_a_path_that_is_not_utf_8() -> None:
    program = """
import asyncio, os, grpc
async def main():
    server = grpc.aio.server()
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    while server._server.is_running():
        await asyncio.sleep(0.01)
    os._exit(3)  # a normal exit can hang
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            with socket.create_connection(("127.0.0.1", int(process.stdout.readline()))) as connection:
                connection.sendall(encode_call(b"/\xff"))
                assert process.wait(timeout=10) == 3
        except subprocess.TimeoutExpired:
            pytest.fail("grpcio survives the call: the workaround in server/grpc/unknown_methods.py can be removed")
        finally:
            process.kill()


@pytest.mark.timeout(60)
def test_the_process_exits_when_the_grpc_server_stops_by_itself(settings: Settings) -> None:
    """Without the workaround of `unknown_methods`, a path that is not UTF-8 stops the gRPC server."""
    program = f"""
import asyncio, os
from fake_engine import FakeEngine
from yuan_grpc.server.grpc import unknown_methods
unknown_methods._SERVER_NAMES = ("a name that grpcio does not have",)
from yuan_grpc.server.server import serve
from yuan_grpc.server.settings import *
from yuan_grpc.server.settings.grpc_port import GrpcSettings
from yuan_grpc.server.settings.security import SecuritySettings
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
            with socket.create_connection(("127.0.0.1", settings.port)) as connection:
                connection.sendall(encode_call(b"/\xff"))
                assert process.wait(timeout=20) == 1
        finally:
            process.kill()  # otherwise a failed test would wait for it forever


async def test_a_second_signal_stops_the_server_without_waiting_for_running_calls(settings: Settings) -> None:
    server, engine, stream = await start_with_running_stream(settings)
    await server.send_sigterm()
    while await server.next_health() != STATUS.NOT_SERVING:
        pass
    await server.send_sigterm()
    assert await stream.code() is grpc.StatusCode.UNAVAILABLE
    assert await server.wait_for_exit() == 0
    assert engine.freed.is_set()


async def test_calls_that_exceed_the_grace_period_are_ended_and_freed(settings: Settings) -> None:
    server, engine, stream = await start_with_running_stream(replace(settings, grace_seconds=0))
    await server.send_sigterm()
    assert await stream.code() is grpc.StatusCode.UNAVAILABLE
    assert await server.wait_for_exit() == 0
    assert engine.freed_before_stop


async def test_the_server_can_be_stopped_while_the_engine_starts(settings: Settings) -> None:
    engine = FakeEngine()
    server = RunningServer(settings, engine)
    await server.next_health()
    await server.send_sigterm()
    assert await server.wait_for_exit() == 0
    assert engine.stopped


async def test_the_server_stops_if_the_engine_fails_to_start(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngine()
    engine.start_error = RuntimeError("no such weights")
    with pytest.raises(StartError, match="RuntimeError: no such weights"):
        await serve(settings, engine)
    assert engine.stopped
    assert "no such weights" in caplog.text


async def test_the_server_stops_if_the_engine_dies(settings: Settings) -> None:
    engine = FakeEngine()
    engine.may_start.set()
    server = RunningServer(settings, engine)
    while await server.next_health() != STATUS.SERVING:
        pass
    engine.died.set()
    assert await server.next_health() == STATUS.NOT_SERVING
    assert await server.wait_for_exit() == 1
    assert engine.stopped


async def test_a_port_that_was_taken_after_the_checks_is_named(settings: Settings) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", settings.port))
        other.listen()
        with pytest.raises(StartError, match=f"cannot listen on 127.0.0.1:{settings.port}: the port is in use"):
            await serve(settings, FakeEngine())


def test_the_time_to_ready_counts_from_the_command() -> None:
    age = time.time() - psutil.Process().create_time()
    assert abs(seconds_since_command() - age) < 5


async def test_the_banner_names_the_model_the_address_and_a_command(settings: Settings) -> None:
    banner = startup_banner(settings)
    assert f"grpc     127.0.0.1:{settings.port} (plaintext)" in banner
    assert "the demo" in banner
    assert "serve a real one with --model FOLDER" in banner
    assert "random weights, for load tests" in startup_banner(replace(settings, model=LOAD_TEST))
    assert "model    /models/Yuan2-2B-hf\n" in startup_banner(replace(settings, model="/models/Yuan2-2B-hf"))
    assert f"http://127.0.0.1:{settings.port}/yuan.v1.YuanService/Generate" in banner
    assert "any free port" in startup_banner(replace(settings, port=0))
    assert "http://[::1]:1/" in startup_banner(replace(settings, host="::1", port=1))


async def test_pings_of_an_idle_client_each_second_are_answered() -> None:
    """grpcio's client has a minimum interval of its own, so this one writes HTTP/2 frames."""
    goaway, ping, settings, acknowledgement = 7, 6, 4, 1
    async with serve_grpc(FakeEngine()) as address:
        host, port = address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + http2_frame(settings, b""))
        for number in range(5):
            writer.write(http2_frame(ping, payload := number.to_bytes(8, "big")))
            while (frame := await read_http2_frame(reader)) != (ping, acknowledgement, payload):
                assert frame[0] != goaway, frame
            await asyncio.sleep(0.8)  # the client's interval; by default grpcio answers two that are this close
        writer.close()


def http2_frame(kind: int, payload: bytes) -> bytes:
    """Return an HTTP/2 frame of the connection, without flags."""
    return len(payload).to_bytes(3, "big") + bytes([kind, 0]) + bytes(4) + payload


async def read_http2_frame(reader: asyncio.StreamReader) -> tuple[int, int, bytes]:
    """Return the kind, the flags and the payload of the next HTTP/2 frame."""
    head = await reader.readexactly(9)
    return head[3], head[4], await reader.readexactly(int.from_bytes(head[:3], "big"))


async def test_a_wait_that_is_cancelled_leaves_no_error_to_the_loop() -> None:
    starting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    shielded = asyncio.shield(starting)
    waiting = asyncio.create_task(server.wait_for_first(shielded, asyncio.Event().wait()))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert shielded.cancelled()  # otherwise the loop logs the error of a start that a stop has ended
