"""The HTTP port: disconnected and slow clients, invalid input, and startup and shutdown together with gRPC."""

import asyncio
import json
import logging
import os
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import grpc
import httpx
import pytest
from fake_engine import FakeEngine, last, more
from servers import connect_socket, encode_post, http_client, parse_events, serve_http, serve_http_client

from yuan_grpc.server.core.generation_service import GenerationService
from yuan_grpc.server.engine.types import EngineRequest, StepOutput
from yuan_grpc.server.errors import RequestNotFoundError
from yuan_grpc.server.http import Listener
from yuan_grpc.server.server import serve, startup_banner
from yuan_grpc.server.settings import DEMO, Settings
from yuan_grpc.server.start_error import StartError
from yuan_grpc.v1 import yuan_pb2 as pb
from yuan_grpc.v1 import yuan_pb2_grpc

BODY = json.dumps({"prompt": "AB"}).encode()
STREAM = json.dumps({"prompt": "AB", "stream": True}).encode()
MANY = json.dumps({"prompt": ["AB"] * 3}).encode()
CHAT = json.dumps({"messages": [{"role": "user", "content": "A"}], "stream": True}).encode()


async def send(connection: socket.socket, raw: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(connection, raw)


async def receive_all(connection: socket.socket) -> bytes:
    """Return all bytes until the server closes the connection."""
    loop, raw = asyncio.get_running_loop(), b""
    with suppress(ConnectionResetError):
        while chunk := await loop.sock_recv(connection, 2**16):
            raw += chunk
    return raw


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", BODY),
        ("/generate", STREAM),
        ("/v1/completions", BODY),
        ("/v1/completions", STREAM),
        ("/v1/completions", MANY),
        ("/v1/chat/completions", CHAT),
    ],
)
@pytest.mark.parametrize("reset", [False, True])
async def test_a_disconnect_frees_the_engine_request_before_any_output(
    path: str, body: bytes, reset: bool, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngine(hangs=True)
    with caplog.at_level(logging.INFO, "yuan_grpc"):
        async with serve_http(engine) as listener:
            connection = connect_socket(listener.port)
            await send(connection, encode_post(path, body))
            await engine.began.wait()
            if reset:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.close()
            await engine.freed.wait()
        assert engine.running == 0
    [record] = caplog.records
    assert ": CANCELLED after" in record.message


async def test_a_disconnect_within_the_body_is_logged_as_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        async with serve_http_client(FakeEngine()) as client:
            port = client.base_url.port
            assert port is not None
            with connect_socket(port) as connection:
                await send(connection, encode_post("/generate", BODY)[:-3])
            while not caplog.records:  # noqa: ASYNC110 - the log has no event for it
                await asyncio.sleep(0)
    assert re.search("POST /generate '[0-9a-f]{32}': CANCELLED", caplog.text)
    assert "Traceback" not in caplog.text


class EndlessEngine(FakeEngine):
    """An engine that yields without end or pause."""

    async def generate(
        self, request: EngineRequest, *, stream: bool, deadline: asyncio.Event | None = None
    ) -> AsyncGenerator[StepOutput, None]:
        try:
            while True:
                yield more("a" * 10_000)
                await asyncio.sleep(0)  # lets other tasks run
        finally:
            self.freed.set()


@pytest.mark.parametrize(("path", "body"), [("/generate", STREAM), ("/v1/completions", STREAM)])
async def test_a_slow_reader_slows_the_engine_down_and_frees_it_on_disconnect(path: str, body: bytes) -> None:
    engine = EndlessEngine()
    async with serve_http(engine) as listener:
        with connect_socket(listener.port) as connection:
            await send(connection, encode_post(path, body))
            connections: Any = listener._server.server_state.connections
            while not any(p.flow.write_paused for p in connections):  # noqa: ASYNC110 - uvicorn has no event for it
                await asyncio.sleep(0)
            [protocol] = connections
            assert protocol.transport.get_write_buffer_size() < 2**24
        await engine.freed.wait()


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
async def test_abort_ends_an_http_call_whose_id_the_server_generated(path: str) -> None:
    engine = FakeEngine(more("a"), hangs=True)
    async with (
        serve_http(engine) as listener,
        http_client(listener.port) as client,
        client.stream("POST", path, json={"prompt": "A", "stream": True}) as response,
    ):
        await listener._state.service.inflight.abort(response.headers["x-request-id"])
        content = await response.aread()
    assert b'"message":"the call was ended by Abort"' in content
    assert engine.running == 0


async def test_abort_does_not_find_an_http_call_by_an_id_that_its_client_chose() -> None:
    engine = FakeEngine(hangs=True)
    async with serve_http(engine) as listener, http_client(listener.port) as client:
        call = asyncio.ensure_future(client.post("/generate", json={"prompt": "A", "request_id": "mine"}))
        await engine.began.wait()
        with pytest.raises(RequestNotFoundError):
            await listener._state.service.inflight.abort("mine")
        assert engine.running == 1
        call.cancel()
        await engine.freed.wait()


async def test_an_http_1_0_stream_ends_with_the_connection() -> None:
    async with serve_http(FakeEngine(more("a"), last("b"))) as listener:
        with connect_socket(listener.port) as connection:
            await send(connection, encode_post("/generate", STREAM).replace(b"HTTP/1.1", b"HTTP/1.0"))
            head, _, body = (await receive_all(connection)).partition(b"\r\n\r\n")
    assert b"chunked" not in head
    assert b"server:" not in head.lower()
    assert body == b'{"text":["ABa"]}\0{"text":["ABab"]}\0'


async def test_a_body_may_be_chunked_and_slow() -> None:
    async with serve_http(FakeEngine(last("yes"))) as listener:
        with connect_socket(listener.port) as connection:
            head = (
                b"POST /generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
            )
            for part in (head, *(b"1\r\n%c\r\n" % byte for byte in BODY), b"0\r\n\r\n"):
                await send(connection, part)
            assert (await receive_all(connection)).endswith(b'{"text":["AByes"]}')


async def test_expect_100_continue_is_answered_before_the_body() -> None:
    head = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\nExpect: 100-continue\r\n\r\n"
    async with serve_http(FakeEngine(last("yes"))) as listener:
        with connect_socket(listener.port) as connection:
            await send(connection, head % 2**23)
            assert (await asyncio.get_running_loop().sock_recv(connection, 2**16)).startswith(b"HTTP/1.1 413 ")
        with connect_socket(listener.port) as connection:
            await send(connection, head % len(BODY))
            assert (await asyncio.get_running_loop().sock_recv(connection, 2**16)).startswith(b"HTTP/1.1 100 ")


JUNK = {
    "random bytes": random.Random(0).randbytes(5000),
    "zeros": bytes(5000),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
    "endless headers": b"POST /generate HTTP/1.1\r\n" + b"x: y\r\n" * 100_000,
    "an endless request line": b"POST /" + b"a" * 200_000,
    "a negative content length": b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
    "two content lengths": b"POST /generate HTTP/1.1\r\nHost: localhost\r\n"
    b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
    "no host header": b"GET /health HTTP/1.1\r\n\r\n",
    "an invalid chunk that nobody reads": b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "an invalid chunk size": b"POST /generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "no path": b"GET  HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "an unknown version": b"GET /health HTTP/9.9\r\nHost: localhost\r\n\r\n",
}


@pytest.mark.parametrize("raw", JUNK.values(), ids=JUNK)
async def test_invalid_input_closes_only_its_own_connection(raw: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async with serve_http(FakeEngine(last("yes"))) as listener:
        with connect_socket(listener.port) as connection:
            with suppress(OSError):
                await send(connection, raw)
                connection.shutdown(socket.SHUT_WR)
            response = await receive_all(connection)
        assert response == b"" or response.startswith((b"HTTP/1.1 40", b"HTTP/1.1 200"))
        with connect_socket(listener.port) as connection:
            await send(connection, encode_post("/generate", BODY, "Connection: close\r\n"))
            assert (await receive_all(connection)).endswith(b'{"text":["AByes"]}')
    assert "Traceback" not in caplog.text


@pytest.fixture
def settings() -> Settings:
    with socket.socket() as first, socket.socket() as second:
        for unused in (first, second):
            unused.bind(("127.0.0.1", 0))
        port, http_port = first.getsockname()[1], second.getsockname()[1]
    return Settings(DEMO, "127.0.0.1", port, grace_seconds=3600, engine_flags=(), http_port=http_port)


class RunningServer:
    """A server of gRPC and HTTP in this process, and clients of both."""

    def __init__(self, settings: Settings, engine: FakeEngine) -> None:
        self.engine = engine
        self.http_port: int = settings.http_port or 0
        engine.may_start.set()
        self.exit_status = asyncio.ensure_future(serve(settings, engine))
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{settings.port}")
        self.stub = yuan_pb2_grpc.YuanServiceStub(self.channel)
        self.client = http_client(self.http_port)

    async def wait_until_ready(self) -> None:
        await self.stub.GetModel(pb.GetModelRequest(), wait_for_ready=True)

    def send_sigterm(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    async def wait_until_draining(self) -> None:
        """Return when the HTTP port refuses calls."""
        async with http_client(self.http_port) as client:
            while (await client.get("/health")).status_code != 503:
                pass

    async def wait_for_exit(self) -> int:
        await self.client.aclose()
        status = await self.exit_status
        await self.channel.close()
        return status


async def test_grpc_and_http_return_the_same_output(settings: Settings) -> None:
    server = RunningServer(settings, FakeEngine(last("yes")))
    await server.wait_until_ready()
    assert (await server.client.post("/generate", json={"prompt": "A"})).json() == {"text": ["Ayes"]}
    response = await server.client.post("/v1/completions", json={"prompt": "A", "model": DEMO})
    assert response.json()["choices"][0]["text"] == "yes"
    assert (await server.stub.Generate(pb.GenerateRequest(prompt="A"))).choices[0].text == "yes"
    server.send_sigterm()
    assert await server.wait_for_exit() == 0


class WaitingEngine(FakeEngine):
    """An engine that finishes all requests when `may_finish` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.may_finish = asyncio.Event()

    async def generate(
        self, request: EngineRequest, *, stream: bool, deadline: asyncio.Event | None = None
    ) -> AsyncGenerator[StepOutput, None]:
        self.running += 1
        yield StepOutput()
        await self.may_finish.wait()
        yield last("yes" * 10_000)


async def test_calls_that_finish_within_the_grace_period_get_their_responses(settings: Settings) -> None:
    engine = WaitingEngine()
    server = RunningServer(settings, engine)
    await server.wait_until_ready()
    bodies = [{"prompt": "A", "stream": index % 2 == 0} for index in range(20)]
    calls = [asyncio.ensure_future(server.client.post("/v1/completions", json=body)) for body in bodies]
    while engine.running < 20:  # noqa: ASYNC110 - the fake engine has no event for it
        await asyncio.sleep(0)
    server.send_sigterm()
    await server.wait_until_draining()
    assert not engine.stopped
    engine.may_finish.set()
    for body, response in zip(bodies, await asyncio.gather(*calls), strict=True):
        content = parse_events(response.content) if body["stream"] else [response.json(), "[DONE]"]
        assert (content[0]["choices"][0]["text"], content[-1]) == ("yes" * 10_000, "[DONE]")
    assert await server.wait_for_exit() == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_calls_that_exceed_the_grace_period_get_an_error_and_are_freed(settings: Settings, stream: bool) -> None:
    engine = FakeEngine(more("a"), hangs=True)
    server = RunningServer(replace(settings, grace_seconds=0), engine)
    await server.wait_until_ready()
    call = asyncio.ensure_future(server.client.post("/v1/completions", json={"prompt": "A", "stream": stream}))
    await engine.began.wait()
    server.send_sigterm()
    response = await call
    error = (parse_events(response.content)[-1] if stream else response.json())["error"]
    assert error["message"] == "the server is stopping"
    assert response.status_code == (200 if stream else 503)
    assert await server.wait_for_exit() == 0
    assert engine.freed_before_stop


async def test_a_second_signal_stops_the_server_without_waiting(settings: Settings) -> None:
    engine = EndlessEngine()
    server = RunningServer(settings, engine)
    await server.wait_until_ready()
    with connect_socket(server.http_port) as connection, connect_socket(server.http_port) as other:
        await send(connection, encode_post("/generate", STREAM))  # never reads the response
        await asyncio.get_running_loop().sock_recv(connection, 1)
        await send(other, encode_post("/generate", BODY)[:-1])
        server.send_sigterm()
        await server.wait_until_draining()
        server.send_sigterm()
        assert await server.wait_for_exit() == 0
    assert engine.freed.is_set()


async def test_idle_and_slow_connections_do_not_delay_the_shutdown(settings: Settings) -> None:
    server = RunningServer(settings, FakeEngine())
    await server.wait_until_ready()
    await server.client.get("/health")  # leaves a keep-alive connection
    with connect_socket(server.http_port) as silent, connect_socket(server.http_port) as slow:
        await send(slow, encode_post("/generate", BODY)[:-1])
        server.send_sigterm()
        assert await server.wait_for_exit() == 0
        assert await receive_all(silent) == b""


async def test_a_call_to_a_stopping_server_is_unavailable() -> None:
    async with serve_http(FakeEngine(last())) as listener, http_client(listener.port) as client:
        assert (await client.get("/health")).status_code == 200
        listener._state.stopping = True
        response = await client.post("/generate", json={"prompt": "A"})
        assert (response.status_code, response.headers["connection"]) == (503, "close")
        assert (await client.get("/health")).status_code == 503


@pytest.mark.parametrize("field", ["port", "http_port"])
async def test_a_port_that_was_taken_after_the_checks_is_named(settings: Settings, field: str) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", getattr(settings, field)))
        other.listen()
        with pytest.raises(StartError, match=f"cannot listen on 127.0.0.1:{getattr(settings, field)}: the port is in"):
            await serve(settings, FakeEngine())


async def test_an_invalid_host_is_named(settings: Settings) -> None:
    with pytest.raises(StartError, match=r"cannot listen on 256\.0\.0\.1:"):
        await serve(replace(settings, host="256.0.0.1"), FakeEngine())


@pytest.mark.parametrize("host", ["localhost", "::1", "::", "0.0.0.0"])
async def test_the_listener_binds_the_host(host: str) -> None:
    try:
        listener = Listener(GenerationService(FakeEngine()), host, 0)
    except OSError:
        assert ":" in host
        pytest.skip("this machine has no IPv6")
    listener.start()
    address = "[::1]" if host == "::1" else "127.0.0.1"
    async with httpx.AsyncClient(trust_env=False, verify=False) as client:
        assert (await client.get(f"http://{address}:{listener.port}/health")).status_code == 200
    await listener.close()


async def test_connections_have_no_delay_and_use_keepalive() -> None:
    async with serve_http(FakeEngine()) as listener, http_client(listener.port) as client:
        await client.get("/health")
        [connection] = listener._server.server_state.connections
        accepted = connection.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 30
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000


def test_the_banner_has_the_http_address(settings: Settings) -> None:
    assert f"http     127.0.0.1:{settings.http_port} (plaintext)" in startup_banner(settings)
    assert "http     127.0.0.1, any free port (plaintext)" in startup_banner(replace(settings, http_port=0))
    assert "http     " not in startup_banner(replace(settings, http_port=None))


@pytest.mark.timeout(60)
def test_http_packages_are_not_imported_without_http() -> None:
    program = "import sys, yuan_grpc.server.server; print([m for m in ('starlette', 'uvicorn') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
