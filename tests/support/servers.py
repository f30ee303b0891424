"""The real gRPC and HTTP servers on free ports, with any engine, and what HTTP tests send and parse."""

import json
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
from fake_engine import FakeEngine

from yuan_grpc.server.core.generation_service import GenerationService
from yuan_grpc.server.engine.protocol import Engine
from yuan_grpc.server.grpc.health import Health
from yuan_grpc.server.grpc.mesh import Mesh
from yuan_grpc.server.grpc.servicer import NAME, YuanService
from yuan_grpc.server.http import Listener
from yuan_grpc.server.security.authentication import OPEN, Authenticator
from yuan_grpc.server.security.certificates import Certificates
from yuan_grpc.server.server import create_server
from yuan_grpc.server.settings import HttpSettings
from yuan_grpc.server.settings.grpc_port import GrpcSettings
from yuan_grpc.server.settings.mesh import MeshSettings

DEFAULTS = HttpSettings()
GRPC_DEFAULTS = GrpcSettings()
NO_MESH = MeshSettings()

ORIGINAL_BODY = {
    "prompt": "AB",
    "logprobs": 1,
    "max_tokens": 256,
    "temperature": 1,
    "use_beam_search": False,
    "top_p": 0,
    "top_k": 1,
    "stop": "<eod>",
}
"""The body of the client script that was published with Yuan 2.0."""


@asynccontextmanager
async def serve_grpc(
    engine: Engine,
    health: Health | None = None,
    settings: GrpcSettings = GRPC_DEFAULTS,
    certificates: Certificates | None = None,
    host: str = "127.0.0.1",
    authenticator: Authenticator = OPEN,
    mesh: MeshSettings = NO_MESH,
) -> AsyncIterator[str]:
    """Serve an engine over gRPC; yield the address."""
    service = GenerationService(engine)
    server, port = await create_server(
        YuanService(service),
        health or Health(NAME),
        f"{host}:0",
        settings,
        certificates,
        authenticator,
        Mesh(mesh, service),
    )
    await server.start()
    try:
        yield f"{host}:{port}"
    finally:
        await server.stop(None)


@asynccontextmanager
async def serve_http(
    engine: Engine,
    aliases: Sequence[str] = (),
    settings: HttpSettings = DEFAULTS,
    host: str = "127.0.0.1",
    certificates: Certificates | None = None,
    authenticator: Authenticator = OPEN,
) -> AsyncIterator[Listener]:
    """Serve an engine over HTTP; yield the listener."""
    service = GenerationService(engine)
    listener = Listener(service, host, 0, aliases, settings, certificates, authenticator=authenticator)
    listener.start()
    try:
        yield listener
    finally:
        await listener.close()


def http_client(port: int) -> httpx.AsyncClient:
    """Return an HTTP client of a local port. It loads no certificates, which would take longer than most tests."""
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60, verify=False)


@asynccontextmanager
async def serve_http_client(engine: Engine, aliases: Sequence[str] = ()) -> AsyncIterator[httpx.AsyncClient]:
    """Serve an engine over HTTP; yield a client."""
    async with serve_http(engine, aliases) as listener, http_client(listener.port) as client:
        yield client


async def post(engine: FakeEngine, path: str, body: Any, aliases: Sequence[str] = ()) -> httpx.Response:
    """Return the response to one POST; `body` is a JSON value, or bytes to send unchanged."""
    async with serve_http_client(engine, aliases) as client:
        return await client.post(path, content=body if isinstance(body, bytes) else json.dumps(body))


def parse_events(raw: bytes) -> list[Any]:
    """Return the data of server-sent events, parsed as JSON except for the last, `[DONE]`."""
    *events, remaining = raw.split(b"\n\n")
    assert remaining == b""
    data = [event.removeprefix(b"data: ") for event in events if event.startswith(b"data: ")]
    return ["[DONE]" if item == b"[DONE]" else json.loads(item) for item in data]


def connect_socket(port: int) -> socket.socket:
    """Return a non-blocking socket connected to a local port."""
    connection = socket.create_connection(("127.0.0.1", port))
    connection.setblocking(False)
    return connection


def encode_post(path: str, body: bytes, headers: str = "") -> bytes:
    """Return the bytes of a POST in HTTP/1.1."""
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body
