"""Too many calls, clients that vanish, and readers that do not read."""

import asyncio
from collections.abc import Iterable
from contextlib import AsyncExitStack
from typing import Any

from fake_server import Options
from http2 import REQUEST, encode_stream_call

from chaos.account import FINISHED, LEFT, Run, connect, is_idle, read_all, stub_of
from yuan_grpc.v1 import yuan_pb2 as pb

MIB = 1 << 20
METHODS = [b"/yuan.v1.YuanService/" + name for name in (b"GenerateStream", b"Generate", b"GenerateBatch", b"None")]
RESETS = 100
"""Number of connections that are reset at a time."""
RESET_STEPS = 12
"""Number of different times until a connection is reset, 5 ms apart."""
SHARED = 10
"""Number of connections that share the second half of the idle streams."""
MAX_STALLED = 4 * MIB
"""Memory that a stalled reader may cost the server, in bytes: the output of its request, and messages that wait."""
MAX_IDLE = MIB // 4
"""Memory that a silent stream may cost the server, in bytes."""


class Connections(list[asyncio.StreamWriter]):
    """Connections that are reset at the end of a block."""

    def __enter__(self) -> "Connections":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Reset all connections."""
        for writer in self:
            writer.transport.abort()
        self.clear()


async def vanishing_clients(run: Run) -> None:
    """Of 500 clients half leave in their streams. Then 500 more reset their connections, at any step of a call."""
    options = Options(tokens=20, token_seconds=0.1, limit=100_000, max_num_seqs=1000)
    with run.server(options) as server:

        async def client(number: int) -> None:
            async with connect(server) as channel:
                stream = stub_of(channel).GenerateStream(REQUEST)
                if number % 2:
                    await run.call(read_all(stream))
                else:
                    await stream.read()
                    run.left()

        async def reset(number: int) -> None:
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(encode_stream_call({b":path": METHODS[number % len(METHODS)]}))
            await asyncio.sleep(number % RESET_STEPS / 200)
            writer.transport.abort()
            run.left()

        number = run.size(500, 8)
        await asyncio.gather(*map(client, range(number)))
        for start in range(0, number, RESETS):  # many at a time, so that some meet each step of a call
            await asyncio.gather(*(reset(each) for each in range(start, start + RESETS)))
        run.must_end(FINISHED, LEFT)
        run.must(await is_idle(server), "the requests of clients that vanished are freed")


async def readers_that_never_read(run: Run) -> None:
    """50 clients start streams of 3 MB and never read; callers that read get their streams whole."""
    options = Options(tokens=200, token_seconds=0.002, text="a" * 16_000, limit=100_000)
    with run.server(options) as server, Connections() as writers:
        async with connect(server) as channel:

            async def read(times: int) -> float:
                before = server.cpu_seconds
                for _ in range(times):
                    await run.call(read_all(stub_of(channel).GenerateStream(REQUEST)))
                return (server.cpu_seconds - before) / times

            times = run.size(10, 1)
            alone = await read(times)
            before, number = server.memory, run.size(50)
            for _ in range(number):
                _, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1)
                writers.append(writer)
                writer.write(encode_stream_call())
                run.left()
            await read(times)  # while the streams of the others fill
            growth, together = server.memory - before, await read(times)
        run.must_end(FINISHED, LEFT)
        run.must(growth < number * MAX_STALLED + 16 * MIB, f"a stalled reader costs under 4 MiB, not {growth / number}")
        run.facts.append(f"{growth / number / MIB:.1f} MiB for each stalled reader of 3 MB")
        run.facts.append(f"CPU of a stream that is read: {alone:.2f} s alone, {together:.2f} s next to them")
        writers.close()
        run.must(await is_idle(server), "requests of readers that went away are freed")


async def ten_times_capacity(run: Run) -> None:
    """640 calls of 64 connections at once, where 64 can run and wait."""
    limit = run.size(64)
    with run.server(Options(tokens=5, token_seconds=0.1, limit=limit, max_num_seqs=8)) as server:
        async with AsyncExitStack() as stack:
            channels = [await stack.enter_async_context(connect(server)) for _ in range(limit)]
            stubs = [stub_of(channel) for channel in channels]
            await asyncio.gather(*(run.call(stubs[each % limit].Generate(REQUEST)) for each in range(10 * limit)))
            run.must_end(FINISHED, "RESOURCE_EXHAUSTED")
            run.must(0 < run.outcomes[FINISHED] < 10 * limit, "a part of the calls is served")
            run.must(await is_idle(server), "no call is left")
            await run.call(stubs[0].Generate(REQUEST))
        run.must_end(FINISHED, "RESOURCE_EXHAUSTED")


async def idle_streams(run: Run) -> None:
    """2,000 streams are silent: 1,000 in connections of their own, and 1,000 more in ten of these connections."""
    options = Options(tokens=2, token_seconds=3600, limit=100_000, max_num_seqs=10_000)
    with run.server(options) as server:
        async with AsyncExitStack() as stack:
            number = run.size(1000, SHARED)
            channels = [await stack.enter_async_context(connect(server)) for _ in range(number)]
            stubs = [stub_of(channel) for channel in channels]
            await run.call(stubs[0].GetModel(pb.GetModelRequest()))
            start = server.memory
            streams = await _start_streams(run, stubs)
            with_connections = server.memory
            streams += await _start_streams(run, [stubs[each % SHARED] for each in range(number)])
            with_streams = server.memory
            await run.call(stubs[0].GetModel(pb.GetModelRequest()))
            for stream in streams:
                stream.cancel()
        run.must(await is_idle(server), "no call is left")
    run.must_end(FINISHED, LEFT)
    run.must(with_streams - start < 2 * number * MAX_IDLE + 32 * MIB, "an idle stream costs less than 256 KiB")
    run.facts.append(f"{(with_connections - start) / number / 1024:.0f} KiB for a connection with a stream")
    run.facts.append(f"{(with_streams - with_connections) / number / 1024:.0f} KiB for a stream")
    run.facts.append(f"{2 * number:,} streams: {start / MIB:.0f} to {with_streams / MIB:.0f} MiB")


async def _start_streams(run: Run, stubs: Iterable[Any]) -> list[Any]:
    """Return streams that have begun and are silent. They are counted as left, since their clients cancel them."""
    streams = [stub.GenerateStream(REQUEST) for stub in stubs]
    await asyncio.gather(*(stream.read() for stream in streams))
    for _ in streams:
        run.left()
    return streams
