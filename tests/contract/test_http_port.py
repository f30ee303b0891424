"""The HTTP port: callers who go away, who do not read or talk nonsense; its start beside gRPC's, and its end."""

import asyncio
import json
import logging
import os
import random
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
from http_server import client_of, connected, events, listening, served, written

from yuan_grpc.server.core.generation_service import GenerationService
from yuan_grpc.server.engine.types import EngineRequest, StepOutput
from yuan_grpc.server.http import Listener
from yuan_grpc.server.server import serve, startup_banner
from yuan_grpc.server.settings import DEMO, Settings
from yuan_grpc.v1 import yuan_pb2 as pb
from yuan_grpc.v1 import yuan_pb2_grpc

BODY = json.dumps({"prompt": "AB"}).encode()
STREAM = json.dumps({"prompt": "AB", "stream": True}).encode()
MANY = json.dumps({"prompt": ["AB"] * 3}).encode()
CHAT = json.dumps({"messages": [{"role": "user", "content": "A"}], "stream": True}).encode()


async def sent(caller: socket.socket, raw: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(caller, raw)


async def received(caller: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    loop, raw = asyncio.get_running_loop(), b""
    with suppress(ConnectionResetError):
        while chunk := await loop.sock_recv(caller, 2**16):
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
async def test_a_caller_who_goes_away_frees_the_engine_though_nothing_is_written(
    path: str, body: bytes, reset: bool, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngine(hangs=True)
    with caplog.at_level(logging.INFO, "yuan_grpc"):
        async with listening(engine) as listener:
            caller = connected(listener.port)
            await sent(caller, written(path, body))
            await engine.began.wait()
            if reset:
                caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            caller.close()
            await engine.freed.wait()
        assert engine.running == 0
    [record] = caplog.records
    assert ": CANCELLED after" in record.message


async def test_a_caller_who_goes_away_before_the_body_is_nobody(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        async with served(FakeEngine()) as client:
            port = client.base_url.port
            assert port is not None
            with connected(port) as caller:
                await sent(caller, written("/generate", BODY)[:-3])
            while not caplog.records:  # noqa: ASYNC110 - the log has no event for it
                await asyncio.sleep(0)
    assert "POST /generate '': CANCELLED" in caplog.text
    assert "Traceback" not in caplog.text


class EndlessEngine(FakeEngine):
    """Yields without end, and waits for nobody."""

    async def generate(
        self, request: EngineRequest, *, stream: bool, deadline: asyncio.Event | None = None
    ) -> AsyncGenerator[StepOutput, None]:
        try:
            while True:
                yield more("a" * 10_000)
                await asyncio.sleep(0)  # for the others
        finally:
            self.freed.set()


@pytest.mark.parametrize(("path", "body"), [("/generate", STREAM), ("/v1/completions", STREAM)])
async def test_a_slow_reader_holds_the_engine_back_and_frees_it_when_he_goes(path: str, body: bytes) -> None:
    engine = EndlessEngine()
    async with listening(engine) as listener:
        with connected(listener.port) as caller:
            await sent(caller, written(path, body))
            connections: Any = listener._server.server_state.connections
            while not any(one.flow.write_paused for one in connections):  # noqa: ASYNC110 - uvicorn has no event for it
                await asyncio.sleep(0)
            [connection] = connections
            assert connection.transport.get_write_buffer_size() < 2**24
        await engine.freed.wait()


async def test_abort_ends_a_call_of_http() -> None:
    engine = FakeEngine(hangs=True)
    async with listening(engine) as listener, client_of(listener) as client:
        call = asyncio.ensure_future(client.post("/generate", json={"prompt": "A", "request_id": "mine"}))
        await engine.began.wait()
        await listener._state.service.inflight.abort("mine")
        response = await call
    assert (response.status_code, response.json()["error"]["message"]) == (499, "the call was ended by Abort")


async def test_http_1_0_gets_a_stream_that_ends_with_the_connection() -> None:
    async with listening(FakeEngine(more("a"), last("b"))) as listener:
        with connected(listener.port) as caller:
            await sent(caller, written("/generate", STREAM).replace(b"HTTP/1.1", b"HTTP/1.0"))
            head, _, body = (await received(caller)).partition(b"\r\n\r\n")
    assert b"chunked" not in head
    assert b"server:" not in head.lower()
    assert body == b'{"text":["ABa"]}\0{"text":["ABab"]}\0'


async def test_a_body_may_come_in_chunks_and_slowly() -> None:
    async with listening(FakeEngine(last("yes"))) as listener:
        with connected(listener.port) as caller:
            head = b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
            for part in (head, *(b"1\r\n%c\r\n" % byte for byte in BODY), b"0\r\n\r\n"):
                await sent(caller, part)
            assert (await received(caller)).endswith(b'{"text":["AByes"]}')


async def test_who_asks_before_sending_much_is_told_before() -> None:
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\nExpect: 100-continue\r\n\r\n"
    async with listening(FakeEngine(last("yes"))) as listener:
        with connected(listener.port) as caller:
            await sent(caller, head % 2**23)
            assert (await asyncio.get_running_loop().sock_recv(caller, 2**16)).startswith(b"HTTP/1.1 413 ")
        with connected(listener.port) as caller:
            await sent(caller, head % len(BODY))
            assert (await asyncio.get_running_loop().sock_recv(caller, 2**16)).startswith(b"HTTP/1.1 100 ")


JUNK = {
    "random bytes": random.Random(0).randbytes(5000),
    "zeros": bytes(5000),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
    "a head without an end": b"POST /generate HTTP/1.1\r\n" + b"x: y\r\n" * 100_000,
    "a line without an end": b"POST /" + b"a" * 200_000,
    "a length that is none": b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    "two lengths": b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "a chunk that is none": b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "no path": b"GET  HTTP/1.1\r\nHost: x\r\n\r\n",
    "a version that is none": b"GET /health HTTP/9.9\r\nHost: x\r\n\r\n",
}


@pytest.mark.parametrize("raw", JUNK.values(), ids=JUNK)
async def test_nonsense_closes_its_own_connection_and_harms_nobody(
    raw: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with listening(FakeEngine(last("yes"))) as listener:
        with connected(listener.port) as caller:
            with suppress(OSError):
                await sent(caller, raw)
                caller.shutdown(socket.SHUT_WR)
            answer = await received(caller)
        assert answer == b"" or answer.startswith((b"HTTP/1.1 40", b"HTTP/1.1 200"))
        with connected(listener.port) as caller:
            await sent(caller, written("/generate", BODY, "Connection: close\r\n"))
            assert (await received(caller)).endswith(b'{"text":["AByes"]}')
    assert "Traceback" not in caplog.text


@pytest.fixture
def settings() -> Settings:
    with socket.socket() as one, socket.socket() as other:
        for free in (one, other):
            free.bind(("127.0.0.1", 0))
        port, http_port = one.getsockname()[1], other.getsockname()[1]
    return Settings(DEMO, "127.0.0.1", port, grace_seconds=3600, engine_flags=(), http_port=http_port)


class Running:
    """A server of both in this process, which takes calls."""

    def __init__(self, settings: Settings, engine: FakeEngine) -> None:
        self.engine = engine
        self.http_port: int = settings.http_port or 0
        engine.may_start.set()
        self.exit_status = asyncio.ensure_future(serve(settings, engine))
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{settings.port}")
        self.stub = yuan_pb2_grpc.YuanServiceStub(self.channel)
        self.client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.http_port}", trust_env=False, timeout=60)

    async def until_ready(self) -> None:
        await self.stub.GetModel(pb.GetModelRequest(), wait_for_ready=True)

    def tell_to_stop(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    async def refused(self) -> None:
        """Returns when nobody listens any more."""
        while True:
            try:
                connected(self.http_port).close()
            except ConnectionRefusedError:
                return
            await asyncio.sleep(0)

    async def ended(self) -> int:
        await self.client.aclose()
        status = await self.exit_status
        await self.channel.close()
        return status


async def test_both_ways_lead_to_the_same_answers(settings: Settings) -> None:
    running = Running(settings, FakeEngine(last("yes")))
    await running.until_ready()
    assert (await running.client.post("/generate", json={"prompt": "A"})).json() == {"text": ["Ayes"]}
    response = await running.client.post("/v1/completions", json={"prompt": "A", "model": DEMO})
    assert response.json()["choices"][0]["text"] == "yes"
    assert (await running.stub.Generate(pb.GenerateRequest(prompt="A"))).choices[0].text == "yes"
    running.tell_to_stop()
    assert await running.ended() == 0


class LateEngine(FakeEngine):
    """Answers everybody when it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.go = asyncio.Event()

    async def generate(
        self, request: EngineRequest, *, stream: bool, deadline: asyncio.Event | None = None
    ) -> AsyncGenerator[StepOutput, None]:
        self.running += 1
        yield StepOutput()
        await self.go.wait()
        yield last("yes" * 10_000)


async def test_what_is_finished_in_the_time_left_is_answered(settings: Settings) -> None:
    engine = LateEngine()
    running = Running(settings, engine)
    await running.until_ready()
    bodies = [{"prompt": "A", "stream": place % 2 == 0} for place in range(20)]
    calls = [asyncio.ensure_future(running.client.post("/v1/completions", json=body)) for body in bodies]
    while engine.running < 20:  # noqa: ASYNC110 - the fake engine has no event for it
        await asyncio.sleep(0)
    running.tell_to_stop()
    await running.refused()
    assert not engine.stopped
    engine.go.set()
    for body, response in zip(bodies, await asyncio.gather(*calls), strict=True):
        content = events(response.content) if body["stream"] else [response.json(), "[DONE]"]
        assert (content[0]["choices"][0]["text"], content[-1]) == ("yes" * 10_000, "[DONE]")
    assert await running.ended() == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_calls_that_outlast_the_grace_are_told_and_freed(settings: Settings, stream: bool) -> None:
    engine = FakeEngine(more("a"), hangs=True)
    running = Running(replace(settings, grace_seconds=0), engine)
    await running.until_ready()
    call = asyncio.ensure_future(running.client.post("/v1/completions", json={"prompt": "A", "stream": stream}))
    await engine.began.wait()
    running.tell_to_stop()
    response = await call
    error = (events(response.content)[-1] if stream else response.json())["error"]
    assert error["message"] == "the server is stopping"
    assert response.status_code == (200 if stream else 503)
    assert await running.ended() == 0
    assert engine.freed_before_stop


async def test_told_twice_it_waits_for_nobody(settings: Settings) -> None:
    engine = EndlessEngine()
    running = Running(settings, engine)
    await running.until_ready()
    with connected(running.http_port) as caller, connected(running.http_port) as other:
        await sent(caller, written("/generate", STREAM))  # and does not read
        await asyncio.get_running_loop().sock_recv(caller, 1)
        await sent(other, written("/generate", BODY)[:-1])
        running.tell_to_stop()
        await running.refused()
        running.tell_to_stop()
        assert await running.ended() == 0
    assert engine.freed.is_set()


async def test_callers_who_are_idle_or_slow_do_not_hold_the_end_up(settings: Settings) -> None:
    running = Running(settings, FakeEngine())
    await running.until_ready()
    await running.client.get("/health")  # whose connection is kept
    with connected(running.http_port) as silent, connected(running.http_port) as slow:
        await sent(slow, written("/generate", BODY)[:-1])
        running.tell_to_stop()
        assert await running.ended() == 0
        assert await received(silent) == b""


async def test_a_call_that_comes_while_it_stops_is_unavailable() -> None:
    async with listening(FakeEngine(last())) as listener, client_of(listener) as client:
        assert (await client.get("/health")).status_code == 200
        listener._state.stopping = True
        response = await client.post("/generate", json={"prompt": "A"})
        assert (response.status_code, response.headers["connection"]) == (503, "close")
        assert (await client.get("/health")).status_code == 503


@pytest.mark.parametrize("which", ["port", "http_port"])
async def test_a_port_that_is_taken_is_said_in_one_line(
    settings: Settings, which: str, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", getattr(settings, which)))
        taken.listen()
        assert await serve(settings, FakeEngine()) == 1
    said = f"cannot listen on 127.0.0.1:{getattr(settings, which)}: is it taken, or not an address of this machine?"
    assert caplog.messages == [said]


async def test_a_host_that_is_none_is_said_in_one_line(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    assert await serve(replace(settings, host="256.0.0.1"), FakeEngine()) == 1
    assert caplog.messages[0].startswith("cannot listen on 256.0.0.1:")


@pytest.mark.parametrize("host", ["localhost", "::1", "::", "0.0.0.0"])
async def test_it_listens_where_it_is_told(host: str) -> None:
    try:
        listener = Listener(GenerationService(FakeEngine()), host, 0)
    except OSError:
        assert ":" in host
        pytest.skip("there is no IPv6 here")
    listener.start()
    where = "[::1]" if host == "::1" else "127.0.0.1"
    async with httpx.AsyncClient(trust_env=False) as client:
        assert (await client.get(f"http://{where}:{listener.port}/health")).status_code == 200
    await listener.close()


async def test_answers_are_sent_at_once_and_the_vanished_are_noticed() -> None:
    async with listening(FakeEngine()) as listener, client_of(listener) as client:
        await client.get("/health")
        [connection] = listener._server.server_state.connections
        accepted = connection.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 30


def test_the_first_lines_say_where_http_is(settings: Settings) -> None:
    assert f"http     127.0.0.1:{settings.http_port} (plaintext)" in startup_banner(settings)
    assert "http     127.0.0.1, a free port (plaintext)" in startup_banner(replace(settings, http_port=0))
    assert "http     " not in startup_banner(replace(settings, http_port=None))


def test_nothing_of_http_is_imported_where_it_is_not_served() -> None:
    program = "import sys, yuan_grpc.server.server; print([m for m in ('starlette', 'uvicorn') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
