"""A server process with a fake engine: floods, signals, logs, and what one caller's requests cost another."""

import asyncio
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from fake_server import Options, fake_server
from google.rpc import error_details_pb2, status_pb2

from yuan_grpc.client import AsyncClient, YuanError
from yuan_grpc.v1 import yuan_pb2 as pb
from yuan_grpc.v1 import yuan_pb2_grpc

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]
OK = grpc.StatusCode.OK
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
REQUEST = pb.GenerateRequest(prompt="AB")
LOOPS = 64


@pytest.fixture(autouse=True)
def default_hangup() -> Iterator[None]:
    """Let server processes receive SIGHUP, which they inherit as ignored if the tests run under `nohup`."""
    handler = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, handler)


@pytest.fixture
def port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port: int = unused.getsockname()[1]
        return port


@asynccontextmanager
async def stub_of(port: int) -> AsyncIterator[Any]:
    """Yield a stub without retries, with a connection of its own."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        yield yuan_pb2_grpc.YuanServiceStub(channel)


async def code_of(call: Awaitable[Any]) -> grpc.StatusCode:
    """Return the status code of a call."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return OK


async def test_every_call_of_a_burst_is_served(port: int) -> None:
    with fake_server(port, Options(limit=100_000), stderr=subprocess.DEVNULL):
        async with stub_of(port) as stub:
            codes = await asyncio.gather(*[code_of(stub.Generate(REQUEST)) for _ in range(4000)])
    assert Counter(codes) == {OK: 4000}


async def test_every_call_of_a_burst_above_the_limit_is_refused_with_a_delay(port: int) -> None:
    async def delay_of(call: Awaitable[Any]) -> float:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call
        trailers = dict(raised.value.trailing_metadata() or ())
        _, detail = status_pb2.Status.FromString(trailers["grpc-status-details-bin"]).details
        info = error_details_pb2.RetryInfo()
        assert detail.Unpack(info)
        return float(info.retry_delay.seconds)

    with fake_server(port, Options(tokens=2, token_seconds=3600, limit=1), stderr=subprocess.PIPE) as process:
        async with stub_of(port) as stub:
            running = stub.GenerateStream(REQUEST)
            await running.read()
            delays = await asyncio.gather(*[delay_of(stub.Generate(REQUEST)) for _ in range(2000)])
            running.cancel()
        process.send_signal(signal.SIGTERM)
        _, log = await asyncio.to_thread(process.communicate)
    assert set(delays) == {1}
    assert log.count(b"RESOURCE_EXHAUSTED") < 200  # about two lines a second


@pytest.mark.parametrize("kind", ["raw", "client"])
async def test_a_stopping_server_cancels_no_call(port: int, kind: str) -> None:
    codes, is_over = Counter[grpc.StatusCode](), asyncio.Event()

    async def call_until_over(call: Callable[[], Awaitable[grpc.StatusCode]]) -> None:
        while not is_over.is_set():
            codes[await call()] += 1

    async def call_client(client: AsyncClient) -> grpc.StatusCode:
        try:
            await client.generate("AB")
        except YuanError as error:
            return error.code
        return OK

    options = Options(tokens=3, token_seconds=0.01, lame_duck_seconds=2)
    with fake_server(port, options, stderr=subprocess.DEVNULL) as process:
        async with stub_of(port) as stub, AsyncClient(f"127.0.0.1:{port}", timeout=60) as client:
            calls = {"raw": lambda: code_of(stub.Generate(REQUEST)), "client": lambda: call_client(client)}
            loops = [asyncio.ensure_future(call_until_over(calls[kind])) for _ in range(LOOPS)]
            while codes[OK] < 2 * LOOPS:  # noqa: ASYNC110 - a counter has no event
                await asyncio.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(process.wait) == 0
            is_over.set()
            await asyncio.gather(*loops)
    assert set(codes) == {OK, UNAVAILABLE}


async def test_calls_that_exceed_the_grace_period_get_a_status_of_the_server(port: int) -> None:
    options = Options(tokens=2, token_seconds=3600, grace_seconds=0.1)
    with fake_server(port, options, stderr=subprocess.DEVNULL) as process:
        async with stub_of(port) as stub:
            calls = [asyncio.ensure_future(stub.Generate(REQUEST)) for _ in range(20)]
            stream = stub.GenerateStream(REQUEST)
            await stream.read()
            process.send_signal(signal.SIGTERM)
            results = await asyncio.gather(*calls, return_exceptions=True)
    errors = [result for result in results if isinstance(result, grpc.aio.AioRpcError)]
    assert len(errors) == len(results)
    assert {(error.code(), error.details()) for error in errors} == {(UNAVAILABLE, "the server is stopping")}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_each_stop_signal_lets_running_calls_finish(port: int, number: signal.Signals) -> None:
    with fake_server(port, Options(tokens=50, token_seconds=0.02), stderr=subprocess.DEVNULL) as process:
        async with stub_of(port) as stub:
            stream = stub.GenerateStream(REQUEST)
            await stream.read()
            process.send_signal(number)
            assert await code_of(_read_all(stream)) is OK
        assert await asyncio.to_thread(process.wait) == 0


async def _read_all(stream: Any) -> None:
    while await stream.read() is not grpc.aio.EOF:
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stop_signal_during_the_imports_is_a_clean_exit(number: signal.Signals) -> None:
    command = (sys.executable, "-m", "yuan_grpc", "serve", "--port", "0")
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        while b"yuan-grpc" not in process.stderr.readline():  # the banner, before vLLM is imported
            pass
        process.send_signal(number)
        log = process.stderr.read().decode()
    assert process.returncode == 0
    assert f"yuan-grpc: stopped by {number.name} before the server has started\n" in log


async def test_a_log_that_nobody_reads_does_not_block_the_server(port: int) -> None:
    with fake_server(port, Options(), stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 4096)
        async with stub_of(port) as stub:
            for _ in range(3):  # each has several times the lines that fit into the pipe
                assert await asyncio.gather(*[code_of(stub.Generate(REQUEST)) for _ in range(200)]) == [OK] * 200
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait) == 0


async def test_dropped_log_lines_are_counted_when_the_log_is_read_again(port: int) -> None:
    with fake_server(port, Options(log_texts=16), stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 4096)
        async with stub_of(port) as stub:
            for _ in range(3):
                await asyncio.gather(*[code_of(stub.Generate(REQUEST)) for _ in range(200)])
        reading = asyncio.ensure_future(asyncio.to_thread(process.stderr.read))
        process.send_signal(signal.SIGTERM)
        log = await reading
    assert b" log lines were dropped\n" in log
    assert log.endswith(b"stopped\n")


async def test_a_full_disk_for_the_log_does_not_keep_the_server_from_serving(port: int) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    with fake_server(port, Options(), stderr=full) as process:
        async with stub_of(port) as stub:
            assert await code_of(stub.Generate(REQUEST)) is OK
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait) == 0
    os.close(full)


HEAVY: dict[str, Callable[[], pb.GenerateRequest]] = {
    "long prompt": lambda: pb.GenerateRequest(prompt="A" * 4_000_000),
    "long prompt that is truncated": lambda: pb.GenerateRequest(prompt="A" * 3_900_000, truncate_prompt_tokens=10),
    "many messages": lambda: pb.GenerateRequest(messages=[pb.Message()] * 1_390_000),
    "many token ids": lambda: pb.GenerateRequest(prompt_token_ids=pb.TokenIds(ids=[1] * 4_000_000)),
}


@pytest.mark.parametrize("kind", HEAVY)
async def test_a_rejected_request_does_not_delay_the_tokens_of_others(port: int, kind: str) -> None:
    """The fake engine takes 1 ms for 1,000 characters, on the event loop."""
    raw = HEAVY[kind]().SerializeToString()
    options = Options(tokens=100_000, token_seconds=0.005, tokenize_seconds=1e-6)
    with fake_server(port, options, stderr=subprocess.DEVNULL):
        async with stub_of(port) as stub, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as other:
            generate: Any = other.unary_unary("/yuan.v1.YuanService/Generate")
            stream = stub.GenerateStream(REQUEST)
            await stream.read()
            gap_before = await _largest_gap(stream, asyncio.sleep(1))
            gap = await _largest_gap(stream, _send_repeatedly(generate, raw))
            stream.cancel()
    assert gap < 2 + 3 * gap_before  # tokenizing would take four seconds


async def _send_repeatedly(generate: Any, raw: bytes) -> None:
    for _ in range(3):
        assert await code_of(generate(raw)) is grpc.StatusCode.INVALID_ARGUMENT


async def _largest_gap(stream: Any, work: Awaitable[None]) -> float:
    """Return the largest time between two messages of a stream until the work is done, in seconds."""
    task, largest, last = asyncio.ensure_future(work), 0.0, time.monotonic()
    while not task.done():
        await stream.read()
        largest, last = max(largest, time.monotonic() - last), time.monotonic()
    await task
    return largest
