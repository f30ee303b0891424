"""The HTTP calls on a real port, with an engine by hand."""

import json
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
from fake_engine import FakeEngine

from yuan_grpc.server.core.generation_service import GenerationService
from yuan_grpc.server.http import Listener

ORIGINAL = {
    "prompt": "AB",
    "logprobs": 1,
    "max_tokens": 256,
    "temperature": 1,
    "use_beam_search": False,
    "top_p": 0,
    "top_k": 1,
    "stop": "<eod>",
}
"""The body of Yuan's calling script."""


@asynccontextmanager
async def listening(engine: Any, aliases: Sequence[str] = ()) -> AsyncIterator[Listener]:
    """A port of this engine's."""
    listener = Listener(GenerationService(engine), "127.0.0.1", 0, aliases)
    listener.start()
    try:
        yield listener
    finally:
        await listener.close()


def client_of(listener: Listener) -> httpx.AsyncClient:
    """A client of a port."""
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{listener.port}", trust_env=False, timeout=60)


@asynccontextmanager
async def served(engine: FakeEngine, aliases: Sequence[str] = ()) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a port of this engine's."""
    async with listening(engine, aliases) as listener, client_of(listener) as client:
        yield client


async def post(engine: FakeEngine, path: str, body: Any, aliases: Sequence[str] = ()) -> httpx.Response:
    """One call, of JSON or of bytes as they are."""
    async with served(engine, aliases) as client:
        return await client.post(path, content=body if isinstance(body, bytes) else json.dumps(body))


def events(raw: bytes) -> list[Any]:
    """What a stream of events has, and `[DONE]` for its end."""
    *chunks, rest = raw.split(b"\n\n")
    assert rest == b""
    data = [chunk.removeprefix(b"data: ") for chunk in chunks if chunk.startswith(b"data: ")]
    return ["[DONE]" if one == b"[DONE]" else json.loads(one) for one in data]


def connected(port: int) -> socket.socket:
    """A caller who speaks for himself, and blocks nobody."""
    caller = socket.create_connection(("127.0.0.1", port))
    caller.setblocking(False)
    return caller


def written(path: str, body: bytes, head: str = "") -> bytes:
    """The bytes of a POST."""
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{head}\r\n".encode() + body
