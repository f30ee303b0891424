"""Clients that hold connections, exhaust the server, or come from the page of another site, over a real HTTP port."""

import asyncio
import json
import resource
import socket
import subprocess
import sys
import time
from asyncio import events
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_engine import FakeEngine, last
from servers import connect_socket, encode_post, http_client, serve_http

from yuan_grpc.server.http import Listener, acceptor, call, connection
from yuan_grpc.server.http.acceptor import MAX_CONNECTIONS, MIN_CONNECTIONS, default_max_connections
from yuan_grpc.server.http.connection import FREE_CHUNKS
from yuan_grpc.server.settings import HttpSettings
from yuan_grpc.v1 import yuan_pb2 as pb
from yuan_grpc.v1 import yuan_pb2_grpc

BODY = json.dumps({"prompt": "AB"}).encode()
SHORT_TIMEOUTS = HttpSettings(header_timeout=0.05, body_timeout=0.05)
CLOSE = "Connection: close\r\n"


async def send(client: socket.socket, raw: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(client, raw)


async def receive_all(client: socket.socket) -> bytes:
    """Return all bytes until the server closes the connection."""
    loop, raw = asyncio.get_running_loop(), b""
    with suppress(ConnectionResetError):
        while chunk := await loop.sock_recv(client, 2**16):
            raw += chunk
    return raw


async def exchange(port: int, raw: bytes) -> bytes:
    """Return the response to bytes on a connection of their own."""
    with connect_socket(port) as client:
        await send(client, raw)
        return await receive_all(client)


def open_connections(listener: Listener) -> set[Any]:
    return listener._server.server_state.connections


async def wait_for_connections(listener: Listener, count: int) -> None:
    while len(open_connections(listener)) != count:  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0)


INCOMPLETE = {
    "nothing": b"",
    "half a head": b"POST /generate HTTP/1.1\r\nHost: local",
    "a second head": b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea",
}


@pytest.mark.parametrize("raw", INCOMPLETE.values(), ids=INCOMPLETE)
async def test_a_connection_without_a_whole_head_is_closed(raw: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yuan_grpc.server.http.listener.KEEP_ALIVE_SECONDS", 0.05)
    async with serve_http(FakeEngine(), settings=SHORT_TIMEOUTS) as listener:
        response = await exchange(listener.port, raw)
        await wait_for_connections(listener, 0)
    assert response == b"" or response.startswith(b"HTTP/1.1 200 ")


async def test_the_next_head_on_a_connection_is_limited_like_the_first() -> None:
    async with serve_http(FakeEngine(), settings=SHORT_TIMEOUTS) as listener:
        with connect_socket(listener.port) as client:
            await send(client, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await asyncio.get_running_loop().sock_recv(client, 2**16)
            await send(client, b"GET /hea")
            assert await receive_all(client) == b""


@pytest.mark.parametrize("length", [f"Content-Length: {len(BODY)}", "Transfer-Encoding: chunked"])
async def test_an_incomplete_body_gets_a_timeout(length: str) -> None:
    async with serve_http(FakeEngine(), settings=SHORT_TIMEOUTS) as listener:
        with connect_socket(listener.port) as client:
            await send(client, f"POST /generate HTTP/1.1\r\nHost: localhost\r\n{length}\r\n{CLOSE}\r\n".encode())
            head, _, body = (await receive_all(client)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert json.loads(body)["error"]["message"].startswith("the body must arrive within 0.05 seconds")


async def test_a_body_that_arrives_steadily_may_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "MIN_BODY_RATE", 0.01)
    settings = HttpSettings(body_timeout=0.001)
    async with serve_http(FakeEngine(last("yes")), settings=settings) as listener, http_client(listener.port) as other:
        with connect_socket(listener.port) as client:
            raw = encode_post("/generate", BODY, CLOSE)
            await send(client, raw[:-1])
            for _ in range(5):
                await other.get("/health")
            await send(client, raw[-1:])
            assert (await receive_all(client)).endswith(b'{"text":["AByes"]}')


async def test_a_body_that_nobody_reads_does_not_keep_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "LINGER_SECONDS", 0.05)
    async with serve_http(FakeEngine()) as listener:
        with connect_socket(listener.port) as client:
            await send(client, b"POST /unknown HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
            with suppress(OSError):
                while True:
                    await send(client, b"400\r\n" + bytes(1024) + b"\r\n")
        await wait_for_connections(listener, 0)


async def test_a_new_connection_replaces_the_one_that_waits_longest(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine(last("yes"))
    async with serve_http(engine, settings=HttpSettings(max_connections=2)) as listener:
        with connect_socket(listener.port) as first:
            await wait_for_connections(listener, 1)
            with connect_socket(listener.port) as second:
                await wait_for_connections(listener, 2)
                with connect_socket(listener.port) as third:
                    assert await receive_all(first) == b""
                    await send(third, encode_post("/generate", BODY, CLOSE))
                    assert (await receive_all(third)).endswith(b'{"text":["AByes"]}')
                await send(second, encode_post("/generate", BODY, CLOSE))
                assert (await receive_all(second)).endswith(b'{"text":["AByes"]}')
    assert caplog.messages == ["the limit on HTTP connections is reached (2); idle ones are closed"]


async def test_a_connection_with_a_running_request_is_not_replaced(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptor, "WARNING_SECONDS", 3600)
    engine = FakeEngine(hangs=True)
    async with serve_http(engine, settings=HttpSettings(max_connections=1)) as listener:
        with connect_socket(listener.port) as client:
            await send(client, encode_post("/generate", BODY))
            await engine.began.wait()
            for _ in range(20):
                assert (await exchange(listener.port, b"")).startswith(b"HTTP/1.1 503 ")
            assert engine.running == 1
    assert caplog.messages == ["the limit on HTTP connections is reached (1); new ones are refused"]


async def test_many_silent_connections_do_not_exceed_the_limit() -> None:
    async with serve_http(FakeEngine(last("yes")), settings=HttpSettings(max_connections=10)) as listener:
        with ExitStack() as stack:
            for _ in range(200):
                stack.enter_context(connect_socket(listener.port))
            response = await exchange(listener.port, encode_post("/generate", BODY, CLOSE))
            assert response.endswith(b'{"text":["AByes"]}')
            assert len(open_connections(listener)) <= 10


@pytest.fixture
def no_free_files() -> Iterator[None]:
    """Let the process open no further file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as unused:
        lowest_free = unused.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_accepting_is_retried_when_files_are_free_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(acceptor, "RETRY_SECONDS", 0)
    monkeypatch.setattr(acceptor, "WARNING_SECONDS", 3600)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with serve_http(FakeEngine(last("yes"))) as listener:
        with socket.socket() as client:
            client.setblocking(False)
            request.getfixturevalue("no_free_files")
            await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", listener.port))
            await send(client, encode_post("/generate", BODY, CLOSE))
            for _ in range(100):
                await asyncio.sleep(0)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert (await receive_all(client)).endswith(b'{"text":["AByes"]}')
    assert caplog.messages == ["cannot accept HTTP connections: Too many open files; retrying each 0 s"]


@pytest.mark.timeout(60)
async def test_idle_connections_leave_files_for_both_ports_and_a_short_log() -> None:
    program = str(Path(__file__).parents[1] / "support" / "limited_server.py")
    process = await asyncio.create_subprocess_exec(
        sys.executable, program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin
    assert process.stdout
    assert process.stderr
    errors = asyncio.ensure_future(process.stderr.read())
    try:
        port, http_port = map(int, (await process.stdout.readline()).split())
        with ExitStack() as stack:
            for _ in range(150):
                stack.enter_context(connect_socket(http_port))
            async with http_client(http_port) as client:
                response = await client.post("/generate", json={"prompt": "AB"})
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                answer = await yuan_pb2_grpc.YuanServiceStub(channel).Generate(pb.GenerateRequest(prompt="AB"))
            process.stdin.write(b"\n")
            open_files = int(await process.stdout.readline())
            process.stdin.close()
        await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
    assert response.json() == {"text": ["AByes"]}
    assert answer.choices[0].text == "yes"
    assert open_files < 64
    log = (await errors).decode()
    assert "Traceback" not in log
    assert len(log.splitlines()) < 50


@pytest.mark.parametrize(
    ("files", "limit"),
    [(96, MIN_CONNECTIONS), (1024, 448), (2**20, MAX_CONNECTIONS), (resource.RLIM_INFINITY, MAX_CONNECTIONS)],
)
def test_half_of_the_files_are_for_http(files: int, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (files, files))
    assert default_max_connections() == limit


@pytest.mark.parametrize("length", [b"Content-Length: 5", b"Content-Length: 0", b"content-length:100"])
async def test_a_body_of_two_lengths_is_rejected(length: bytes) -> None:
    raw = b"POST /generate HTTP/1.1\r\nHost: localhost\r\n%s\r\nTransfer-Encoding: chunked\r\n\r\n" % length
    raw += b"0\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    engine = FakeEngine(last("yes"))
    async with serve_http(engine) as listener:
        response = await exchange(listener.port, raw)
    assert response.startswith(b"HTTP/1.1 400 ")
    assert response.count(b"HTTP/1.1 ") == 1
    assert b"`Transfer-Encoding` must not be given together with `Content-Length`" in response


async def test_a_body_of_many_small_chunks_is_rejected() -> None:
    head = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with serve_http(FakeEngine(last("yes"))) as listener:
        with connect_socket(listener.port) as client:
            with suppress(OSError):
                await send(client, head + b"1\r\n \r\n" * (FREE_CHUNKS + 100))
            assert (await receive_all(client)).startswith(b"HTTP/1.1 400 ")
        chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"400\r\n" + b" " * 1024 + b"\r\n"
        raw = head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + chunks + b"0\r\n\r\n"
        assert (await exchange(listener.port, raw)).endswith(b'{"text":["AByes"]}')


async def test_large_bodies_are_limited_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "SMALL_BODY", 1000)
    monkeypatch.setattr(call, "MAX_LARGE_BODIES", 5000)
    large = b" " * 4000 + BODY
    async with serve_http(FakeEngine(last("yes"))) as listener, http_client(listener.port) as client:
        state = listener._state
        with connect_socket(listener.port) as half:
            await send(half, encode_post("/generate", large)[:-1])
            while not state.large_bodies:  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(0)
            response = await client.post("/generate", content=large)
            assert (response.status_code, response.headers["retry-after"]) == (429, "1")
            assert (await client.post("/generate", content=BODY)).status_code == 200
        while state.large_bodies:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0)
        assert (await client.post("/generate", content=large)).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("app.localhost", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8000", 200),
        ("192.0.2.7", 200),
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("localhost.evil.example", 403),
        ("evil.example@localhost", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost:80:80", 403),
        ("[localhost]", 403),
        ("", 403),
    ],
)
async def test_a_local_port_serves_only_local_hosts(host: str, status: int) -> None:
    engine = FakeEngine(last("yes"))
    async with serve_http(engine) as listener, http_client(listener.port) as client:
        for path in ("/health", "/v1/models", "/metrics"):
            response = await client.get(path, headers={"host": host})
            assert response.status_code == status
        response = await client.post("/generate", content=BODY, headers={"host": host})
    assert response.status_code == status
    assert bool(engine.requests) == (status == 200)
    if status == 403:
        assert response.json()["error"]["code"] == "host_not_allowed"


async def test_a_request_of_http_1_0_needs_no_host() -> None:
    async with serve_http(FakeEngine()) as listener:
        assert (await exchange(listener.port, b"GET /health HTTP/1.0\r\n\r\n")).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("address", "allowed", "host", "status"),
    [
        ("0.0.0.0", (), "service.example", 200),
        ("0.0.0.0", ("service.example",), "service.example:8000", 200),
        ("0.0.0.0", ("service.example",), "evil.example", 403),
        ("0.0.0.0", ("service.example",), "127.0.0.1", 200),
        ("127.0.0.1", ("service.example",), "service.example", 200),
        ("127.0.0.1", ("*",), "evil.example", 200),
        ("localhost", (), "localhost", 200),
        ("localhost", (), "evil.example", 403),
    ],
)
async def test_the_allowed_hosts_depend_on_the_address_and_the_settings(
    address: str, allowed: tuple[str, ...], host: str, status: int
) -> None:
    settings = HttpSettings(allowed_hosts=allowed)
    async with (
        serve_http(FakeEngine(), settings=settings, host=address) as listener,
        http_client(listener.port) as client,
    ):
        assert (await client.get("/health", headers={"host": host})).status_code == status


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:3000", "http://127.0.0.1", ""])
@pytest.mark.parametrize("content_type", ["text/plain", "application/json"])
async def test_a_page_of_another_site_cannot_send_requests(origin: str, content_type: str) -> None:
    engine = FakeEngine(last("yes"))
    async with serve_http(engine) as listener, http_client(listener.port) as client:
        headers = {"origin": origin, "content-type": content_type}
        response = await client.post("/generate", content=BODY, headers=headers)
        preflight = await client.options("/generate", headers={"origin": origin})
    assert (response.status_code, response.json()["error"]["code"]) == (403, "origin_not_allowed")
    assert preflight.status_code == 403
    assert "access-control-allow-origin" not in response.headers
    assert not engine.requests


async def test_a_page_of_an_allowed_origin_can_send_requests() -> None:
    settings = HttpSettings(allowed_origins=("https://app.example",))
    allowed, other = {"origin": "https://app.example"}, {"origin": "https://evil.example"}
    preflight = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    engine = FakeEngine(last("yes"))
    async with serve_http(engine, settings=settings) as listener, http_client(listener.port) as client:
        response = await client.post("/generate", content=BODY, headers=allowed)
        options = await client.options("/generate", headers=allowed | preflight)
        refused = await client.post("/generate", content=BODY, headers=other)
    assert response.json() == {"text": ["AByes"]}
    for reply in (response, options):
        assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, "https://app.example")
    assert refused.status_code == 403


HOSTILE_BODIES = {
    "keys": b"{" + b",".join(b'"k%d":1' % index for index in range(300_000)) + b"}",
    "lists": b'{"a":[' + b"[]," * 1_300_000 + b"1]}",
    "messages": b'{"messages":[' + b"{}," * 1_300_000 + b"{}]}",
    "content parts": b'{"messages":[{"role":"user","content":[' + b'"",' * 1_300_000 + b'""]}]}',
}


async def largest_step(listener: Listener, raw: bytes, monkeypatch: pytest.MonkeyPatch) -> float:
    """Return the CPU time of the longest step of the event loop while a request is served, in seconds."""
    run, seconds = events.Handle._run, [0.0]

    def timed_run(handle: Any) -> None:
        start = time.thread_time()
        run(handle)
        seconds.append(time.thread_time() - start)

    with monkeypatch.context() as patched:
        patched.setattr(events.Handle, "_run", timed_run)
        assert (await exchange(listener.port, raw)).startswith(b"HTTP/1.1 400 ")
    return max(seconds)


@pytest.mark.parametrize("body", HOSTILE_BODIES.values(), ids=HOSTILE_BODIES)
@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions"])
async def test_a_hostile_body_delays_others_little_more_than_a_long_prompt(
    path: str, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = json.dumps({"prompt_token_ids": [30_000] * 2**17}).encode()  # longer than the context
    async with serve_http(FakeEngine()) as listener:
        usual = max([await largest_step(listener, encode_post("/generate", prompt, CLOSE), monkeypatch) for _ in "123"])
        hostile = await largest_step(listener, encode_post(path, body, CLOSE), monkeypatch)
    assert hostile < 4 * usual
