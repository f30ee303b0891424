"""Hostile connections, too few files, and a full disk."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
from fake_server import Options
from http2 import PREFACE, REQUEST, encode_stream_call, frame
from ports import free_port

from chaos.account import FINISHED, FakeServer, Run, connect, is_idle, is_true_within, stub_of
from chaos.traffic import Connections
from yuan_grpc.server.security.identity import Scope
from yuan_grpc.server.security.tokens import create_token, format_line
from yuan_grpc.v1 import yuan_pb2 as pb

FILES = 96
SPARE = 16
"""Open files that a server may have more than before."""
HTTP_HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"


@asynccontextmanager
async def calling(run: Run, channel: grpc.aio.Channel, metadata: Any = ()) -> AsyncIterator[None]:
    """Call in a loop during the block, at least once, and check that each call finishes."""
    is_over, ends = asyncio.Event(), set[str]()

    async def loop() -> None:
        while not (is_over.is_set() and ends):
            ends.add(await run.call(stub_of(channel).Generate(REQUEST, metadata=metadata)))

    task = asyncio.ensure_future(loop())
    try:
        yield
    finally:
        is_over.set()
        await task
    run.must(ends == {FINISHED}, f"a caller next to them is served each time, not {ends}")


async def hostile_connections(run: Run) -> None:
    """Oversize, malformed and unauthenticated calls; garbage, slow and half-open connections on both ports."""
    token, http_port, file = create_token(), free_port(), run.folder / "tokens"
    file.write_text(format_line("alice", [Scope.GENERATE], token) + "\n")
    limits = ("--max-request-bytes", "64K", "--http-header-timeout", "1", "--http-body-timeout", "1")
    arguments = ("--token-file", str(file), "--http-port", str(http_port), *limits)
    metadata = (("authorization", f"Bearer {token}"),)
    with run.server(Options(tokens=2, token_seconds=0.01, limit=1000, arguments=arguments)) as server:
        async with connect(server) as channel, connect(server) as other:
            await run.call(stub_of(channel).Generate(REQUEST, metadata=metadata))
            before = server.open_files
            async with calling(run, channel, metadata):
                with Connections() as connections:
                    await _open(connections, server.port, _garbage(run.size(20)))
                    await _open(connections, http_port, [HTTP_HEAD, b"GET / HTTP/1.1\r\nHo"] * run.size(20))
                    await asyncio.gather(*(_call_wrongly(run, other, metadata) for _ in range(run.size(50))))
                    await asyncio.gather(*(_drip(server.port) for _ in range(run.size(20))))
            run.must(await is_idle(server), "no call is left")
            run.must(await _has_files(server, before + SPARE), f"their files are closed, not {server.open_files} open")
    run.must_end(FINISHED, "RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNAUTHENTICATED", "UNIMPLEMENTED")
    refused = {"RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNAUTHENTICATED", "UNIMPLEMENTED"}
    run.must(refused <= run.outcomes.keys(), "each wrong call has its status")


def _garbage(times: int) -> list[bytes]:
    """Return the first bytes of connections that are no gRPC, or that stop at once."""
    call = encode_stream_call()
    once = [b"", PREFACE, PREFACE + frame(4, 0, 0), b"\0" * 1000, b"\x16\x03\x01" + b"a" * 500, call[:80], call]
    return once * times


async def _open(connections: Connections, port: int, firsts: Iterable[bytes]) -> None:
    for first in firsts:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        connections.append(writer)
        writer.write(first)


async def _call_wrongly(run: Run, channel: grpc.aio.Channel, metadata: Any) -> None:
    raw: Any = channel.unary_unary("/yuan.v1.YuanService/Generate")
    await run.call(raw(b"\xff" * 100, metadata=metadata))
    await run.call(raw(pb.GenerateRequest(prompt="A" * 100_000).SerializeToString(), metadata=metadata))
    await run.call(stub_of(channel).Generate(REQUEST))
    await run.call(stub_of(channel).Generate(REQUEST, metadata=(("authorization", "Bearer wrong"),)))
    unknown: Any = channel.unary_unary("/yuan.v1.YuanService/None")
    await run.call(unknown(b"", metadata=metadata))


async def _drip(port: int) -> None:
    """Send a call byte by byte; the server may hang up."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for byte in encode_stream_call()[:-1]:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.005)
    except ConnectionError:
        pass
    finally:
        writer.transport.abort()


async def _has_files(server: FakeServer, limit: int) -> bool:
    async def condition() -> bool:
        return server.open_files <= limit

    return await is_true_within(condition)


async def few_files(run: Run) -> None:
    """300 connections to each port of a server with `ulimit -n 96`; an open one is served, and later new ones too."""
    http_port = free_port()
    options = Options(files=FILES, limit=1000, arguments=("--http-port", str(http_port)))
    with run.server(options) as server:
        async with AsyncExitStack() as stack:
            channel = await stack.enter_async_context(connect(server))
            await run.call(stub_of(channel).Generate(REQUEST))
            with Connections() as connections:
                for port in (server.port, http_port):
                    await _open(connections, port, [PREFACE + frame(4, 0, 0)] * run.size(300, 100))
                async with calling(run, channel):
                    await asyncio.sleep(1)  # the time in which a server without files would fail
                run.facts.append(f"{server.open_files} open files of {FILES}")
            run.must(await _has_files(server, FILES // 2), "the files of closed connections are free again")
            new = await stack.enter_async_context(connect(server))
            await run.call(stub_of(new).Generate(REQUEST, wait_for_ready=True))
        lines = (run.folder / "log").read_text(errors="replace").splitlines()
        run.must(len([line for line in lines if " Generate " not in line]) < 200, "the log of refused files is short")
    run.must_end(FINISHED)


async def full_disk(run: Run) -> None:
    """The disk for the log is full: calls are served, and a stop is clean."""
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        with run.server(Options(), stderr=full) as server:
            async with connect(server) as channel:
                calls = (stub_of(channel).Generate(REQUEST) for _ in range(run.size(500)))
                await asyncio.gather(*(run.call(call) for call in calls))
            server.process.terminate()
            status = await asyncio.to_thread(server.process.wait)
            run.must(status == 0, f"the server stops with status 0, not {status}")
    finally:
        os.close(full)
    run.must_end(FINISHED)
