"""More calls than the engine can run: what is refused, what waits, and whose turn it is."""

import asyncio
import socket
import subprocess
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import grpc
import httpx
import psutil
import pytest
from fake_engine import INFO, FakeEngine, last, more
from fake_server import Options, fake_server
from google.rpc import error_details_pb2, status_pb2
from servers import serve_grpc, serve_http

from yuan_grpc.server.core.admission import limits_of
from yuan_grpc.server.engine.types import EngineRequest, StepOutput
from yuan_grpc.v1 import yuan_pb2 as pb
from yuan_grpc.v1 import yuan_pb2_grpc

pytestmark = pytest.mark.slow

OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)
CODES = grpc.StatusCode
CALLS, CONNECTIONS = 10_000, 20


async def code_of(call: Any) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return CODES.OK


def stub_of(channel: grpc.aio.Channel) -> Any:
    return yuan_pb2_grpc.YuanServiceStub(channel)


class FirstComeEngine(FakeEngine):
    """An engine that computes two requests at a time, in the order of their arrival, and none before `may_run`."""

    def __init__(self) -> None:
        super().__init__()
        self.info = replace(INFO, max_num_seqs=2, max_num_queued_reqs=64)
        self.finished: list[int] = []
        self.may_run = asyncio.Event()
        self._slots = asyncio.Semaphore(2)

    async def generate(
        self, request: EngineRequest, *, stream: bool, deadline: asyncio.Event | None = None
    ) -> AsyncGenerator[StepOutput, None]:
        yield StepOutput()
        async with self._slots:
            await self.may_run.wait()
            for _ in range(20):
                await asyncio.sleep(0)
        yield last("yes")


@pytest.mark.timeout(120)
async def test_a_light_caller_among_128_heavy_loops_gets_all_its_answers() -> None:
    """The loops try again at once when they are refused, as clients without a delay do."""
    engine, done = FirstComeEngine(), asyncio.Event()
    engine.may_run.set()
    heavy_request = pb.GenerateRequest(prompt="A" * 60, max_tokens=60)
    codes = Counter[grpc.StatusCode]()
    async with (
        serve_grpc(engine) as address,
        grpc.aio.insecure_channel(address, OWN_CONNECTION) as heavy,
        grpc.aio.insecure_channel(address, OWN_CONNECTION) as light,
    ):

        async def loop() -> None:
            while not done.is_set():
                codes[await code_of(stub_of(heavy).Generate(heavy_request))] += 1

        loops = [asyncio.ensure_future(loop()) for _ in range(128)]
        while not codes[CODES.RESOURCE_EXHAUSTED]:  # noqa: ASYNC110 - progress of the loops
            await asyncio.sleep(0.01)
        for _ in range(30):
            response = await stub_of(light).Generate(pb.GenerateRequest(prompt="A"))
            assert response.choices[0].text == "yes"
        done.set()
        await asyncio.gather(*loops)
    assert codes.keys() == {CODES.OK, CODES.RESOURCE_EXHAUSTED}


async def test_a_refusal_has_a_delay_for_the_retry() -> None:
    engine = FakeEngine(more("a"), hangs=True)
    engine.info = replace(INFO, max_num_queued_reqs=1)
    async with serve_grpc(engine) as address, grpc.aio.insecure_channel(address) as channel:
        running = stub_of(channel).GenerateStream(pb.GenerateRequest(prompt="AB"))
        await running.read()
        with pytest.raises(grpc.aio.AioRpcError, match=r"the request queue is full \(limit 1\)") as error:
            await stub_of(channel).Generate(pb.GenerateRequest(prompt="AB"))
        running.cancel()
    trailers = dict(error.value.trailing_metadata() or ())
    assert 1000 <= int(trailers["grpc-retry-pushback-ms"]) <= 2000
    status: Any = status_pb2
    details: Any = error_details_pb2
    retry = details.RetryInfo()
    unpacked = [
        detail.Unpack(retry) for detail in status.Status.FromString(trailers["grpc-status-details-bin"]).details
    ]
    assert any(unpacked)
    assert retry.retry_delay.seconds == 1


async def test_choices_and_beams_count_in_the_queue() -> None:
    engine = FakeEngine(more("a"), hangs=True)
    engine.info = replace(INFO, max_num_queued_reqs=10)
    async with serve_grpc(engine) as address, grpc.aio.insecure_channel(address) as channel:
        stub = stub_of(channel)
        running = stub.GenerateStream(pb.GenerateRequest(prompt="AB", n=6))
        await running.read()
        for request in (
            pb.GenerateRequest(prompt="AB", n=5),
            pb.GenerateRequest(prompt="AB", n=1, best_of=5),
            pb.GenerateRequest(prompt="AB", best_of=5, use_beam_search=True),
        ):
            assert await code_of(stub.Generate(request)) is CODES.RESOURCE_EXHAUSTED
        running.cancel()


async def test_http_calls_are_in_the_same_queue() -> None:
    engine = FakeEngine(more("a"), hangs=True)
    engine.info = replace(INFO, max_num_queued_reqs=1)
    async with (
        serve_http(engine) as listener,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{listener.port}", trust_env=False) as client,
    ):
        body = {"prompt": "A"}
        running = asyncio.ensure_future(client.post("/v1/completions", json=body))
        await engine.began.wait()
        refused = await client.post("/v1/completions", json=body)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        running.cancel()


async def test_deadlines_count_the_time_in_the_queue() -> None:
    engine = FirstComeEngine()
    engine.info = replace(engine.info, max_num_queued_reqs=1000)
    running_limit = limits_of(engine.info).engine
    assert running_limit is not None
    async with serve_grpc(engine) as address, grpc.aio.insecure_channel(address) as channel:
        stub = stub_of(channel)
        streams = [stub.GenerateStream(pb.GenerateRequest(prompt="AB")) for _ in range(running_limit.sequences)]
        for stream in streams:
            await stream.read()
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.Generate(pb.GenerateRequest(prompt="AB"), timeout=0.3)
        assert error.value.code() is CODES.DEADLINE_EXCEEDED
        request = pb.GenerateRequest(prompt="AB", heartbeat_interval={"nanos": 100_000_000})
        waiting = stub.GenerateStream(request)
        assert not (await waiting.read()).choices  # a heartbeat
        engine.may_run.set()
        texts = ""
        while (message := await waiting.read()) is not grpc.aio.EOF:
            texts += "".join(choice.text for choice in message.choices)
        assert texts == "yes"
        for stream in streams:
            stream.cancel()


@pytest.mark.timeout(300)
async def test_thousands_of_calls_are_refused_without_more_memory() -> None:
    """None of them ends. The clients are connections of their own, so that each could have a part of the queue."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    limit, options = limits_of(INFO).queue.sequences, Options(tokens=2, token_seconds=3600)
    codes, used, tasks = Counter[grpc.StatusCode](), list[int](), list[asyncio.Task[None]]()

    async def call(stub: Any) -> None:
        codes[await code_of(stub.Generate(pb.GenerateRequest(prompt="A" * 60)))] += 1

    with fake_server(port, options, stderr=subprocess.DEVNULL) as process:
        async with AsyncExitStack() as stack:
            for number in range(1, CONNECTIONS + 1):
                channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", OWN_CONNECTION)
                stub = stub_of(await stack.enter_async_context(channel))
                tasks += [asyncio.ensure_future(call(stub)) for _ in range(CALLS // CONNECTIONS)]
                while codes.total() < len(tasks) - limit:  # noqa: ASYNC110 - the last ones wait in the server
                    await asyncio.sleep(0.05)
                if number in (CONNECTIONS // 2, CONNECTIONS):
                    used.append(psutil.Process(process.pid).memory_info().rss)
            assert codes.keys() == {CODES.RESOURCE_EXHAUSTED}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    assert used[1] < used[0] + (64 << 20), used  # without a limit, 15,000 more calls took 500 MiB
