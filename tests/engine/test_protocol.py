"""Whatever bytes come to the port, the server closes, refuses or waits, and serves whoever speaks gRPC."""

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
"""How a TLS client begins, more or less."""


def frame(kind: int, flags: int, stream: int, payload: bytes = b"", length: int | None = None) -> bytes:
    """A frame of HTTP/2; `length` is what its head says, where that is not the truth."""
    size = len(payload) if length is None else length
    return size.to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + payload


def headers(fields: Iterable[tuple[str, str]]) -> bytes:
    """A header block: literals that are neither indexed nor compressed. A lone surrogate is a byte that is no UTF-8."""
    return b"".join(
        b"\0" + _sized(name.encode()) + _sized(value.encode("utf-8", "surrogateescape")) for name, value in fields
    )


def _sized(text: bytes) -> bytes:
    size, more = len(text), b""
    if size < 127:
        return bytes([size]) + text
    size -= 127
    while size > 127:
        more += bytes([size % 128 + 128])
        size //= 128
    return b"\x7f" + more + bytes([size]) + text


def opening(method: str = "Generate", **changed: str) -> bytes:
    """The header block of a call."""
    fields = {":method": "POST", ":scheme": "http", ":path": f"/{NAME}/{method}", ":authority": "localhost"}
    fields |= {"content-type": "application/grpc", "te": "trailers"} | changed
    return headers(fields.items())


def message(raw: bytes, length: int | None = None, compressed: int = 0) -> bytes:
    """A gRPC message with its prefix; `length` is what that says, where it is not the truth."""
    return struct.pack(">BI", compressed, len(raw) if length is None else length) + raw


def call(body: bytes, block: bytes | None = None, stream: int = 1, end: int = END_STREAM) -> bytes:
    """The frames of a call."""
    block = opening() if block is None else block
    return frame(HEADERS, END_HEADERS, stream, block) + frame(DATA, end, stream, body)


BEGUN = PREFACE + frame(SETTINGS, 0, 0)
RAW = REQUEST.SerializeToString()
WHOLE = message(RAW)
JUNK = random.Random(0).randbytes(5000)

CONVERSATIONS = {
    "nothing": b"",
    "random bytes": JUNK,
    "zeros": bytes(5000),
    "TLS": HELLO,
    "HTTP/1.1": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello",
    "HTTP/1.1 that wants HTTP/2": b"GET / HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\r\n",
    "half a preface": PREFACE[:10],
    "preface and junk": PREFACE + JUNK,
    "settings and junk": BEGUN + JUNK,
    "a frame longer than allowed": BEGUN + frame(DATA, 0, 1, b"", 2**24 - 1) + bytes(100_000),
    "a frame that never ends": BEGUN + frame(HEADERS, END_HEADERS, 1, opening(), 10_000),
    "settings of a wrong size": PREFACE + frame(SETTINGS, 0, 0, b"12345"),
    "settings out of range": PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HIHI", 4, 2**32 - 1, 5, 0)),
    "settings on a stream": PREFACE + frame(SETTINGS, 0, 3),
    "a ping of a wrong size": BEGUN + frame(PING, 0, 0, b"123"),
    "a window without an end": BEGUN + frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**31 - 1)) * 3,
    "a window of nothing": BEGUN + frame(WINDOW_UPDATE, 0, 0, bytes(4)),
    "data on no stream": BEGUN + frame(DATA, 0, 0, WHOLE),
    "data on an idle stream": BEGUN + frame(DATA, END_STREAM, 5, WHOLE),
    "headers on an even stream": BEGUN + call(WHOLE, stream=2),
    "headers on an old stream": BEGUN + call(WHOLE, stream=5) + call(WHOLE, stream=3),
    "headers on no stream": BEGUN + frame(HEADERS, END_HEADERS, 0, opening()),
    "headers that are junk": BEGUN + frame(HEADERS, END_HEADERS, 1, JUNK[:200]),
    "headers with an unknown index": BEGUN + frame(HEADERS, END_HEADERS, 1, b"\xff\xff\xff\xff\x0f"),
    "padding longer than the frame": BEGUN + frame(HEADERS, END_HEADERS | 0x8, 1, b"\xff" + opening()),
    "a continuation of nothing": BEGUN + frame(CONTINUATION, END_HEADERS, 1, opening()),
    "continuations without an end": BEGUN + frame(HEADERS, 0, 1, opening()) + frame(CONTINUATION, 0, 1, b"") * 1000,
    "a promise": BEGUN + frame(PUSH, END_HEADERS, 1, bytes(4) + opening()),
    "an unknown frame": BEGUN + frame(77, 0xFF, 1, b"what"),
    "a reset of an idle stream": BEGUN + frame(RST_STREAM, 0, 9, CANCEL),
    "a goodbye, and a call": BEGUN + frame(GOAWAY, 0, 0, bytes(8)) + call(WHOLE),
    "a dependency on itself": BEGUN + frame(PRIORITY, 0, 1, struct.pack(">IB", 1, 0)),
    "no headers at all": BEGUN + call(WHOLE, b""),
    "an unknown method": BEGUN + call(WHOLE, opening("Nothing")),
    "a path that is none": BEGUN + call(WHOLE, opening(**{":path": "\x00/../%s"})),
    "a path that is not UTF-8": BEGUN + call(WHOLE, opening("Gener\udcffte")),
    "many of them": BEGUN + b"".join(call(WHOLE, opening("\udcff\udcfe"), stream=i) for i in range(1, 200, 2)),
    "a GET": BEGUN + call(WHOLE, opening(**{":method": "GET"})),
    "another content-type": BEGUN + call(WHOLE, opening(**{"content-type": "text/html"})),
    "huge headers": BEGUN + call(WHOLE, opening(**{f"x-{i}": "y" * 500 for i in range(25)})),
    "a timeout that is none": BEGUN + call(WHOLE, opening(**{"grpc-timeout": "soon"})),
    "an unknown encoding": BEGUN + call(message(RAW, compressed=1), opening(**{"grpc-encoding": "rot13"})),
    "junk said to be gzip": BEGUN + call(message(JUNK[:100], compressed=1), opening(**{"grpc-encoding": "gzip"})),
    "compressed, but no encoding": BEGUN + call(message(RAW, compressed=1)),
    "a flag that is none": BEGUN + call(message(RAW, compressed=200)),
    "half a prefix": BEGUN + call(WHOLE[:3]),
    "a prefix longer than its data": BEGUN + call(message(RAW, length=100)),
    "a prefix shorter than its data": BEGUN + call(message(RAW, length=3)),
    "a prefix of four gigabytes": BEGUN + call(message(RAW, length=2**32 - 1), end=0),
    "two messages where one is due": BEGUN + call(WHOLE * 2),
    "a call without an end": BEGUN + call(WHOLE, end=0),
    "a call without a message": BEGUN + call(b""),
    "a batch cut short": BEGUN + call(WHOLE[:-1], opening("GenerateBatch")),
    "calls, each reset": BEGUN
    + b"".join(call(WHOLE, stream=i, end=0) + frame(RST_STREAM, 0, i, CANCEL) for i in range(1, 400, 2)),
    "pings": BEGUN + frame(PING, 0, 0, bytes(8)) * 1000,
}


@asynccontextmanager
async def connected(served: Served) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A bare connection, closed at the end whatever became of it."""
    reader, writer = await asyncio.open_connection(*served.address.split(":"))
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def say(served: Served, spoken: bytes) -> None:
    """Says it, says that this was all, and hears the server out."""
    async with connected(served) as (reader, writer):
        with suppress(OSError):
            writer.write(spoken)
            await writer.drain()
            writer.write_eof()
            await reader.read()


async def assert_serves(served: Served) -> None:
    """Somebody else, on a connection of their own, is served, and nothing is left of anybody."""
    async with grpc.aio.insecure_channel(served.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        generate: Any = channel.unary_unary(f"/{NAME}/Generate", response_deserializer=pb.GenerateResponse.FromString)
        answer = await generate(RAW)
    assert answer.choices == (await served.generate(REQUEST)).choices
    await assert_freed(served)


@pytest.mark.parametrize("spoken", CONVERSATIONS.values(), ids=list(CONVERSATIONS))
async def test_the_server_outlives_a_conversation(served: Served, spoken: bytes) -> None:
    await say(served, spoken)
    await assert_serves(served)


async def test_the_server_outlives_any_beginning_of_a_call(served: Served) -> None:
    whole = BEGUN + call(WHOLE)
    await asyncio.gather(*[say(served, whole[:end]) for end in range(0, len(whole), 3)])
    await assert_serves(served)


async def test_the_server_outlives_calls_with_a_bit_wrong(served: Served) -> None:
    chance = random.Random(1)
    wrong = [flipped(BEGUN + call(WHOLE), chance) for _ in range(200)]
    await asyncio.gather(*[say(served, one) for one in wrong])
    await assert_serves(served)


def flipped(raw: bytes, chance: random.Random) -> bytes:
    """With one bit another."""
    bits = bytearray(raw)
    bits[chance.randrange(len(bits))] ^= 1 << chance.randrange(8)
    return bytes(bits)


async def test_callers_who_vanish_leave_nothing(served: Served) -> None:
    async def vanish(method: str) -> None:
        async with connected(served) as (reader, writer):
            writer.write(BEGUN + call(message(ENDLESS.SerializeToString()), opening(method)))
            await reader.read(1)
            writer.transport.abort()

    await asyncio.gather(*[vanish(method) for method in ("Generate", "GenerateStream") * 40])
    await assert_serves(served)


async def test_connections_that_say_nothing_keep_nobody_out(served: Served) -> None:
    async with connected(served), connected(served) as (_, writer):
        writer.write(BEGUN + call(WHOLE[:4], end=0))
        await assert_serves(served)


def changed(raw: bytes, chance: random.Random) -> bytes:
    """A message with something amiss: bits, its end, or bytes put in."""
    at = chance.randrange(len(raw) + 1)
    ways: list[Callable[[], bytes]] = [
        lambda: flipped(flipped(raw, chance), chance) if raw else b"\xff",
        lambda: raw[:at],
        lambda: raw[:at] + chance.randbytes(3) + raw[at:],
        lambda: chance.randbytes(chance.randrange(40)),
        lambda: raw * 3,
    ]
    return chance.choice(ways)()


@pytest.mark.parametrize("method", list(SERVICE.methods), ids=[method.name for method in SERVICE.methods])
async def test_bytes_that_are_no_message_are_a_callers_fault(served: Served, method: Any) -> None:
    chance = random.Random(2)
    raw = RAW if method.input_type is pb.GenerateRequest.DESCRIPTOR else b"\x0a\x03abc"
    if method.name == "GenerateBatch":
        raw = pb.GenerateBatchRequest(request=REQUEST).SerializeToString()
    async with grpc.aio.insecure_channel(served.address) as channel:
        codes = await asyncio.gather(*[code_of(channel, method, changed(raw, chance)) for _ in range(100)])
    fine = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "FAILED_PRECONDITION", "DEADLINE_EXCEEDED"}
    assert {code.name for code in codes} <= fine
    await assert_serves(served)


async def code_of(channel: Any, method: Any, raw: bytes) -> grpc.StatusCode:
    """How a call with these bytes ends; what might generate for long is told to hurry."""
    path = f"/{NAME}/{method.name}"
    try:
        if method.name == "GenerateBatch":
            made = channel.stream_stream(path)([raw], timeout=1)
        elif method.name == "GenerateStream":
            made = channel.unary_stream(path)(raw, timeout=1)
        else:
            await channel.unary_unary(path)(raw, timeout=1)
            return grpc.StatusCode.OK
        async for _ in made:
            pass
        return grpc.StatusCode.OK
    except grpc.aio.AioRpcError as error:
        return error.code()
