"""A long mix of requests."""

import asyncio
import random
from contextlib import AsyncExitStack
from typing import Any

import httpx
from fake_server import Options
from http2 import REQUEST
from ports import free_port

from chaos.account import FINISHED, LEFT, Run, connect, is_idle, read_all, stub_of
from yuan_grpc.v1 import yuan_pb2 as pb

MIB = 1 << 20
LOOPS = 32
MAX_GROWTH = 32 * MIB
"""Growth of the memory after the first quarter of the requests, in bytes."""
EXPECTED = (FINISHED, LEFT, "INVALID_ARGUMENT", "NOT_FOUND", "DEADLINE_EXCEEDED")


async def mixed_requests(run: Run) -> None:
    """20,000 requests of nine kinds over gRPC and HTTP, with flat memory after the first quarter."""
    http_port, calls = free_port(), run.size(20_000, 4 * LOOPS)
    options = Options(tokens=4, token_seconds=0.001, limit=100_000, arguments=("--http-port", str(http_port)))
    memory = []
    with run.server(options) as server:
        async with AsyncExitStack() as stack:
            channels = [await stack.enter_async_context(connect(server)) for _ in range(8)]
            client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{http_port}", trust_env=False, verify=False)
            mix = _Mix(run, [stub_of(channel) for channel in channels], await stack.enter_async_context(client))
            for part in range(4):
                loops = (mix.play(calls // 4 // LOOPS, part * LOOPS + loop) for loop in range(LOOPS))
                await asyncio.gather(*loops)
                memory.append(server.memory)
        run.must(await is_idle(server), "no call is left")
    run.must_end(*EXPECTED)
    run.must(run.outcomes[FINISHED] > calls // 4, "most requests are valid and finish")
    run.must(memory[3] - memory[0] < MAX_GROWTH, f"memory is flat, not {[each // MIB for each in memory]} MiB")
    run.facts.append("memory after each quarter: " + ", ".join(f"{each / MIB:.0f}" for each in memory) + " MiB")


class _Mix:
    """Requests of all kinds, in a random order that is the same in each run."""

    def __init__(self, run: Run, stubs: list[Any], client: httpx.AsyncClient) -> None:
        self._run = run
        self._stubs = stubs
        self._client = client
        unary = [self._whole, self._stream, self._batch, self._invalid, self._unknown, self._late, self._tokens]
        self._kinds = [*unary, self._leave, self._http]

    async def play(self, calls: int, seed: int) -> None:
        """Make a number of calls, one after the other."""
        choose = random.Random(seed)
        for _ in range(calls):
            await choose.choice(self._kinds)(choose.choice(self._stubs))

    async def _whole(self, stub: Any) -> None:
        await self._run.call(stub.Generate(pb.GenerateRequest(prompt="AB", n=2)))

    async def _stream(self, stub: Any) -> None:
        await self._run.call(read_all(stub.GenerateStream(REQUEST)))

    async def _batch(self, stub: Any) -> None:
        await self._run.call(read_all(stub.GenerateBatch(iter([pb.GenerateBatchRequest(request=REQUEST)] * 3))))

    async def _invalid(self, stub: Any) -> None:
        await self._run.call(stub.Generate(pb.GenerateRequest(prompt="AB", temperature=-1)))

    async def _unknown(self, stub: Any) -> None:
        await self._run.call(stub.Abort(pb.AbortRequest(request_id="unknown")))

    async def _late(self, stub: Any) -> None:
        await self._run.call(stub.Generate(REQUEST, timeout=0.001))

    async def _tokens(self, stub: Any) -> None:
        await self._run.call(stub.Tokenize(pb.TokenizeRequest(prompt="AB")))

    async def _leave(self, stub: Any) -> None:
        stream = stub.GenerateStream(REQUEST)
        await stream.read()
        stream.cancel()
        self._run.left()

    async def _http(self, _: Any) -> None:
        response = self._client.post("/v1/completions", json={"prompt": "AB", "stream": self._run.sent % 2 == 0})
        await self._run.call(_check(response))


async def _check(response: Any) -> None:
    (await response).raise_for_status()
