"""Invalid HTTP/2 and gRPC input: the server closes, rejects or waits, and continues to serve valid calls."""

import asyncio
import random
import struct
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
import pytest
from engine.conftest import Served
from engine.test_generate import assert_freed

from yuan_grpc.server.grpc.servicer import NAME
from yuan_grpc.v1 import yuan_pb2 as pb

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]

SERVICE = pb.DESCRIPTOR.services_by_name["YuanService"]
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, END_HEADERS = 0x1, 0x4
CANCEL = struct.pack(">I", 8)
REQUEST = pb.GenerateRequest(prompt="世界上最高的山是什么", max_tokens=4, top_k=1)
ENDLESS = pb.GenerateRequest(prompt="a", max_tokens=2000, ignore_eos=True)
HELLO = (
    bytes.fromhex("16030100680100006403034a") + bytes(range(31)) + bytes.fromhex("00000a130113021303c02bc02f01000031")
)
"""Roughly the first bytes of a TLS client."""


def frame(kind: int, flags: int, stream: int, payload: bytes = b"", length: int | None = None) -> bytes:
    """Return an HTTP/2 frame; `length` overrides the length in its header."""
    size = len(payload) if length is None else length
    return size.to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + payload


def headers(fields: Iterable[tuple[str, str]]) -> bytes:
    """Return a header block of uncompressed literals. A lone surrogate encodes a byte that is not UTF-8."""
    return b"".join(
        b"\0" + _length_prefixed(name.encode()) + _length_prefixed(value.encode("utf-8", "surrogateescape"))
        for name, value in fields
    )


def _length_prefixed(text: bytes) -> bytes:
    size, more = len(text), b""
    if size < 127:
        return bytes([size]) + text
    size -= 127
    while size > 127:
        more += bytes([size % 128 + 128])
        size //= 128
    return b"\x7f" + more + bytes([size]) + text


def call_headers(method: str = "Generate", **changed: str) -> bytes:
    """Return the header block of a call."""
    fields = {":method": "POST", ":scheme": "http", ":path": f"/{NAME}/{method}", ":authority": "localhost"}
    fields |= {"content-type": "application/grpc", "te": "trailers"} | changed
    return headers(fields.items())


def message(raw: bytes, length: int | None = None, compressed: int = 0) -> bytes:
    """Return a gRPC message with its prefix; `length` overrides the length in the prefix."""
    return struct.pack(">BI", compressed, len(raw) if length is None else length) + raw


def call(body: bytes, block: bytes | None = None, stream: int = 1, end: int = END_STREAM) -> bytes:
    """Return the frames of a call."""
    block = call_headers() if block is None else block
    return frame(HEADERS, END_HEADERS, stream, block) + frame(DATA, end, stream, body)


CONNECTED = PREFACE + frame(SETTINGS, 0, 0)
RAW = REQUEST.SerializeToString()
MESSAGE = message(RAW)
RANDOM_BYTES = random.Random(0).randbytes(5000)

INPUTS = {
    "nothing": b"",
    "random bytes": RANDOM_BYTES,
    "zeros": bytes(5000),
    "TLS": HELLO,
    "HTTP/1.1": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello",
    "HTTP/1.1 upgrade to HTTP/2": b"GET / HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\r\n",
    "an incomplete preface": PREFACE[:10],
    "preface and random bytes": PREFACE + RANDOM_BYTES,
    "settings and random bytes": CONNECTED + RANDOM_BYTES,
    "a too long frame": CONNECTED + frame(DATA, 0, 1, b"", 2**24 - 1) + bytes(100_000),
    "an incomplete frame": CONNECTED + frame(HEADERS, END_HEADERS, 1, call_headers(), 10_000),
    "settings of a wrong size": PREFACE + frame(SETTINGS, 0, 0, b"12345"),
    "settings out of range": PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HIHI", 4, 2**32 - 1, 5, 0)),
    "settings on a stream": PREFACE + frame(SETTINGS, 0, 3),
    "a ping of a wrong size": CONNECTED + frame(PING, 0, 0, b"123"),
    "a window overflow": CONNECTED + frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**31 - 1)) * 3,
    "a window update of 0": CONNECTED + frame(WINDOW_UPDATE, 0, 0, bytes(4)),
    "data on stream 0": CONNECTED + frame(DATA, 0, 0, MESSAGE),
    "data on an idle stream": CONNECTED + frame(DATA, END_STREAM, 5, MESSAGE),
    "headers on an even stream": CONNECTED + call(MESSAGE, stream=2),
    "headers on a closed stream": CONNECTED + call(MESSAGE, stream=5) + call(MESSAGE, stream=3),
    "headers on stream 0": CONNECTED + frame(HEADERS, END_HEADERS, 0, call_headers()),
    "random header bytes": CONNECTED + frame(HEADERS, END_HEADERS, 1, RANDOM_BYTES[:200]),
    "headers with an unknown index": CONNECTED + frame(HEADERS, END_HEADERS, 1, b"\xff\xff\xff\xff\x0f"),
    "padding longer than the frame": CONNECTED + frame(HEADERS, END_HEADERS | 0x8, 1, b"\xff" + call_headers()),
    "a continuation without headers": CONNECTED + frame(CONTINUATION, END_HEADERS, 1, call_headers()),
    "endless continuations": CONNECTED + frame(HEADERS, 0, 1, call_headers()) + frame(CONTINUATION, 0, 1, b"") * 1000,
    "a push promise": CONNECTED + frame(PUSH, END_HEADERS, 1, bytes(4) + call_headers()),
    "an unknown frame": CONNECTED + frame(77, 0xFF, 1, b"data"),
    "a reset of an idle stream": CONNECTED + frame(RST_STREAM, 0, 9, CANCEL),
    "a call after GOAWAY": CONNECTED + frame(GOAWAY, 0, 0, bytes(8)) + call(MESSAGE),
    "a stream that depends on itself": CONNECTED + frame(PRIORITY, 0, 1, struct.pack(">IB", 1, 0)),
    "no headers": CONNECTED + call(MESSAGE, b""),
    "an unknown method": CONNECTED + call(MESSAGE, call_headers("Nothing")),
    "an invalid path": CONNECTED + call(MESSAGE, call_headers(**{":path": "\x00/../%s"})),
    "a path that is not UTF-8": CONNECTED + call(MESSAGE, call_headers("Gener\udcffte")),
    "many paths that are not UTF-8": CONNECTED
    + b"".join(call(MESSAGE, call_headers("\udcff\udcfe"), stream=i) for i in range(1, 200, 2)),
    "a GET": CONNECTED + call(MESSAGE, call_headers(**{":method": "GET"})),
    "a wrong content type": CONNECTED + call(MESSAGE, call_headers(**{"content-type": "text/html"})),
    "huge headers": CONNECTED + call(MESSAGE, call_headers(**{f"x-{i}": "y" * 500 for i in range(25)})),
    "an invalid timeout": CONNECTED + call(MESSAGE, call_headers(**{"grpc-timeout": "soon"})),
    "an unknown encoding": CONNECTED + call(message(RAW, compressed=1), call_headers(**{"grpc-encoding": "rot13"})),
    "random bytes as gzip": CONNECTED
    + call(message(RANDOM_BYTES[:100], compressed=1), call_headers(**{"grpc-encoding": "gzip"})),
    "compressed without an encoding": CONNECTED + call(message(RAW, compressed=1)),
    "an invalid compression flag": CONNECTED + call(message(RAW, compressed=200)),
    "an incomplete prefix": CONNECTED + call(MESSAGE[:3]),
    "a prefix longer than its data": CONNECTED + call(message(RAW, length=100)),
    "a prefix shorter than its data": CONNECTED + call(message(RAW, length=3)),
    "a prefix of four gigabytes": CONNECTED + call(message(RAW, length=2**32 - 1), end=0),
    "two messages instead of one": CONNECTED + call(MESSAGE * 2),
    "a call that is not ended": CONNECTED + call(MESSAGE, end=0),
    "a call without a message": CONNECTED + call(b""),
    "an incomplete batch": CONNECTED + call(MESSAGE[:-1], call_headers("GenerateBatch")),
    "many reset calls": CONNECTED
    + b"".join(call(MESSAGE, stream=i, end=0) + frame(RST_STREAM, 0, i, CANCEL) for i in range(1, 400, 2)),
    "pings": CONNECTED + frame(PING, 0, 0, bytes(8)) * 1000,
}


@asynccontextmanager
async def connect(served: Served) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Yield a plain TCP connection and close it afterwards."""
    reader, writer = await asyncio.open_connection(*served.address.split(":"))
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def send(served: Served, raw: bytes) -> None:
    """Send bytes, close the sending side, and read until the server closes the connection."""
    async with connect(served) as (reader, writer):
        with suppress(OSError):
            writer.write(raw)
            await writer.drain()
            writer.write_eof()
            await reader.read()


async def assert_serves(served: Served) -> None:
    """Check that a call on a new connection succeeds, and that no engine request remains."""
    async with grpc.aio.insecure_channel(served.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        generate: Any = channel.unary_unary(f"/{NAME}/Generate", response_deserializer=pb.GenerateResponse.FromString)
        response = await generate(RAW)
    assert response.choices == (await served.generate(REQUEST)).choices
    await assert_freed(served)


@pytest.mark.parametrize("raw", INPUTS.values(), ids=list(INPUTS))
async def test_the_server_survives_invalid_input(served: Served, raw: bytes) -> None:
    await send(served, raw)
    await assert_serves(served)


async def test_the_server_survives_calls_cut_off_at_any_byte(served: Served) -> None:
    raw = CONNECTED + call(MESSAGE)
    await asyncio.gather(*[send(served, raw[:end]) for end in range(0, len(raw), 3)])
    await assert_serves(served)


async def test_the_server_survives_calls_with_a_flipped_bit(served: Served) -> None:
    generator = random.Random(1)
    calls = [flip_bit(CONNECTED + call(MESSAGE), generator) for _ in range(200)]
    await asyncio.gather(*[send(served, raw) for raw in calls])
    await assert_serves(served)


def flip_bit(raw: bytes, generator: random.Random) -> bytes:
    """Return the bytes with one bit flipped."""
    bits = bytearray(raw)
    bits[generator.randrange(len(bits))] ^= 1 << generator.randrange(8)
    return bytes(bits)


async def test_aborted_connections_free_their_engine_requests(served: Served) -> None:
    async def abort_connection(method: str) -> None:
        async with connect(served) as (reader, writer):
            writer.write(CONNECTED + call(message(ENDLESS.SerializeToString()), call_headers(method)))
            await reader.read(1)
            writer.transport.abort()

    await asyncio.gather(*[abort_connection(method) for method in ("Generate", "GenerateStream") * 40])
    await assert_serves(served)


async def test_idle_connections_do_not_block_others(served: Served) -> None:
    async with connect(served), connect(served) as (_, writer):
        writer.write(CONNECTED + call(MESSAGE[:4], end=0))
        await assert_serves(served)


def corrupt(raw: bytes, generator: random.Random) -> bytes:
    """Return the message truncated, replaced, repeated, or with flipped bits or inserted bytes."""
    position = generator.randrange(len(raw) + 1)
    corruptions: list[Callable[[], bytes]] = [
        lambda: flip_bit(flip_bit(raw, generator), generator) if raw else b"\xff",
        lambda: raw[:position],
        lambda: raw[:position] + generator.randbytes(3) + raw[position:],
        lambda: generator.randbytes(generator.randrange(40)),
        lambda: raw * 3,
    ]
    return generator.choice(corruptions)()


@pytest.mark.parametrize("method", list(SERVICE.methods), ids=[method.name for method in SERVICE.methods])
async def test_corrupt_messages_never_cause_a_server_error(served: Served, method: Any) -> None:
    generator = random.Random(2)
    raw = RAW if method.input_type is pb.GenerateRequest.DESCRIPTOR else b"\x0a\x03abc"
    if method.name == "GenerateBatch":
        raw = pb.GenerateBatchRequest(request=REQUEST).SerializeToString()
    async with grpc.aio.insecure_channel(served.address) as channel:
        codes = await asyncio.gather(*[code_of(channel, method, corrupt(raw, generator)) for _ in range(100)])
    allowed = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "FAILED_PRECONDITION", "DEADLINE_EXCEEDED"}
    assert {code.name for code in codes} <= allowed
    await assert_serves(served)


async def code_of(channel: Any, method: Any, raw: bytes) -> grpc.StatusCode:
    """Return the status code of a call with these bytes. Calls that may generate for long get a short deadline."""
    path = f"/{NAME}/{method.name}"
    try:
        if method.name == "GenerateBatch":
            stream = channel.stream_stream(path)([raw], timeout=1)
        elif method.name == "GenerateStream":
            stream = channel.unary_stream(path)(raw, timeout=1)
        else:
            await channel.unary_unary(path)(raw, timeout=1)
            return grpc.StatusCode.OK
        async for _ in stream:
            pass
        return grpc.StatusCode.OK
    except grpc.aio.AioRpcError as error:
        return error.code()
