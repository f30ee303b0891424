"""A load client in several processes: streams of one server at one concurrency, with the arrival time of each token.

`measure` starts the processes, lets them connect, starts all streams at once and returns one summary. Each stream is
one request of random token ids that ignores the end-of-text token, or several, one after another.
"""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import chain, cycle, pairwise
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from typing import Any

Arrivals = AsyncIterator[int]
"""Number of tokens in each message as it arrives."""

CHANNELS = 8
"""Connections of each client process over gRPC, over which a server with several processes spreads the streams."""

FIRST_TOKEN_ID = 300
"""Lowest token id of the prompts: those below are special tokens and bytes."""


LONG_PROMPT_TOKENS = 4096
"""Length of the prompts that arrive during a load of shorter ones."""


@dataclass(frozen=True)
class Load:
    """The requests of one measurement.

    Attributes:
        protocol: a key of `PROTOCOLS`.
        addresses: addresses of the server, over which the streams of each process are spread.
        model: the model's name, for HTTP.
        streams: number of concurrent requests.
        processes: number of client processes.
        prompt_tokens: length of each prompt.
        max_tokens: number of tokens to generate for each prompt.
        vocabulary: upper limit of the token ids, exclusive.
        requests: number of requests of each stream, one after another.
        long_prompts_per_s: number of additional prompts of `LONG_PROMPT_TOKENS` in a second, which are not measured.
    """

    protocol: str
    addresses: tuple[str, ...]
    model: str
    streams: int
    processes: int
    prompt_tokens: int
    max_tokens: int
    vocabulary: int
    requests: int = 1
    long_prompts_per_s: float = 0.0


@dataclass
class Timing:
    """Arrival times of one request, in seconds.

    Attributes:
        start: time of the call.
        times: arrival time of each message with tokens.
        tokens: number of tokens in all messages.
    """

    start: float
    times: list[float] = field(default_factory=list)
    tokens: int = 0


def measure(load: Load) -> dict[str, Any]:
    """Run the load once and return its rate and latencies; times in milliseconds.

    Raises:
        RuntimeError: a client process failed.
    """
    context, count = get_context("spawn"), min(load.processes, load.streams)
    barrier = context.Barrier(count)
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    clients = [
        context.Process(target=_run_client, args=(load, index, count, barrier, sender), daemon=True)
        for index, (_, sender) in enumerate(pipes)
    ]
    for client in clients:
        client.start()
    timings: list[Timing] = []
    for (receiver, sender), client in zip(pipes, clients, strict=True):
        sender.close()
        try:
            timings += receiver.recv()
        except EOFError:
            raise RuntimeError(f"a client of {load.protocol} failed") from None
        client.join()
    return {"streams": load.streams, **summarize(timings, without_start=load.long_prompts_per_s > 0)}


def summarize(timings: list[Timing], *, without_start: bool) -> dict[str, Any]:
    """Return the rate of tokens, and the latencies in milliseconds.

    A message of k tokens counts as one gap, as a reader sees it.

    Args:
        timings: all requests of a load.
        without_start: count the gaps from the moment at which all requests have a token, without those that come from
            the prompts of the requests themselves, which arrive at once.
    """
    start = max(timing.times[0] for timing in timings) if without_start else 0.0
    tokens = sum(timing.tokens for timing in timings)
    seconds = max(timing.times[-1] for timing in timings) - min(timing.start for timing in timings)
    first = sorted(timing.times[0] - timing.start for timing in timings)
    gaps = sorted(after - before for timing in timings for before, after in pairwise(timing.times) if before >= start)
    return {
        "tokens": tokens,
        "messages": sum(len(timing.times) for timing in timings),
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        **{f"ttft_p{percent}": quantile(first, percent) for percent in (50, 99)},
        **{f"itl_p{percent}": quantile(gaps, percent) for percent in (50, 99)},
    }


def quantile(values: list[float], percent: int) -> float | None:
    """Return the nearest-rank quantile of sorted seconds, in milliseconds; None if there are none."""
    return 1e3 * values[min(len(values) - 1, len(values) * percent // 100)] if values else None


def _run_client(load: Load, index: int, count: int, barrier: Barrier, sender: Connection) -> None:
    try:
        import uvloop
    except ImportError:  # as on the servers, faster if it is there
        runner = asyncio.Runner()
    else:
        runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    with runner:
        sender.send(runner.run(_run_streams(load, index, count, barrier)))


async def _run_streams(load: Load, index: int, count: int, barrier: Barrier) -> list[Timing]:
    generator = random.Random(f"{index} {time.time_ns()}")
    streams = range(index, load.streams, count)
    prompts = [
        [generator.choices(range(FIRST_TOKEN_ID, load.vocabulary), k=load.prompt_tokens) for _ in range(load.requests)]
        for _ in streams
    ]
    async with PROTOCOLS[load.protocol](load, index) as stream, asyncio.TaskGroup() as group:
        await asyncio.to_thread(barrier.wait)
        others = (
            group.create_task(_send_long_prompts(load, generator, stream))
            if index == 0 and load.long_prompts_per_s
            else None
        )

        async def run(prompts: list[list[int]]) -> list[Timing]:
            return [await _time(stream(prompt)) for prompt in prompts]

        timings = await asyncio.gather(*map(run, prompts))
        if others:
            others.cancel()
    return list(chain.from_iterable(timings))


async def _send_long_prompts(load: Load, generator: random.Random, stream: Callable[[list[int]], Arrivals]) -> None:
    """Send long prompts at regular intervals until this is cancelled."""
    async with asyncio.TaskGroup() as group:
        while True:
            prompt = generator.choices(range(FIRST_TOKEN_ID, load.vocabulary), k=LONG_PROMPT_TOKENS)
            group.create_task(_time(stream(prompt)))
            await asyncio.sleep(1 / load.long_prompts_per_s)


async def _time(arrivals: Arrivals) -> Timing:
    timing = Timing(time.monotonic())
    async for tokens in arrivals:
        if tokens:
            timing.times.append(time.monotonic())
            timing.tokens += tokens
    return timing


@asynccontextmanager
async def _channels(load: Load, index: int) -> AsyncIterator[list[Any]]:
    """Yield connected channels, no more than there are streams; each process begins with another address."""
    import grpc

    async with AsyncExitStack() as stack:
        options = [("grpc.use_local_subchannel_pool", 1)]
        count = min(CHANNELS, load.streams)
        addresses = [load.addresses[(index + number) % len(load.addresses)] for number in range(count)]
        channels = [await stack.enter_async_context(grpc.aio.insecure_channel(each, options)) for each in addresses]
        for channel in channels:
            await channel.channel_ready()
        yield channels


@asynccontextmanager
async def _yuan(load: Load, index: int, *, is_stream: bool) -> AsyncIterator[Callable[[list[int]], Arrivals]]:
    from yuan_grpc.v1 import yuan_pb2 as pb
    from yuan_grpc.v1 import yuan_pb2_grpc

    async with _channels(load, index) as channels:
        stubs: Any = cycle([yuan_pb2_grpc.YuanServiceStub(channel) for channel in channels])

        async def run(prompt: list[int]) -> Arrivals:
            request = pb.GenerateRequest(
                prompt_token_ids=pb.TokenIds(ids=prompt), temperature=0, max_tokens=load.max_tokens, ignore_eos=True
            )
            stub = next(stubs)
            if is_stream:
                async for message in stub.GenerateStream(request):
                    yield sum(len(choice.token_ids) for choice in message.choices)
            else:
                yield (await stub.Generate(request)).usage.completion_tokens

        yield run


@asynccontextmanager
async def _vllm_grpc(load: Load, index: int) -> AsyncIterator[Callable[[list[int]], Arrivals]]:
    from smg_grpc_proto import vllm_engine_pb2 as pb
    from smg_grpc_proto import vllm_engine_pb2_grpc

    async with _channels(load, index) as channels:
        stubs: Any = cycle([vllm_engine_pb2_grpc.VllmEngineStub(channel) for channel in channels])

        async def run(prompt: list[int]) -> Arrivals:
            request = pb.GenerateRequest(
                request_id=f"{id(prompt)}-{time.time_ns()}",
                stream=True,
                tokenized=pb.TokenizedInput(input_ids=prompt),
                sampling_params=pb.SamplingParams(
                    temperature=0.0, top_p=1.0, n=1, max_tokens=load.max_tokens, ignore_eos=True
                ),
            )
            async for message in next(stubs).Generate(request):
                yield len(message.chunk.token_ids)

        yield run


@asynccontextmanager
async def _openai(load: Load, index: int) -> AsyncIterator[Callable[[list[int]], Arrivals]]:
    import aiohttp

    body = {
        "model": load.model,
        "max_tokens": load.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    address = load.addresses[index % len(load.addresses)]
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, raise_for_status=True) as session:

        async def run(prompt: list[int]) -> Arrivals:
            chunks = 0
            async with session.post(f"http://{address}/v1/completions", json=body | {"prompt": prompt}) as response:
                async for line in response.content:
                    if line.startswith(b"data: {") and b'"choices":[]' not in line.replace(b" ", b""):
                        chunks += 1
                        yield 1
                    elif line.startswith(b"data: {"):  # the usage, after all chunks: a chunk may have several tokens
                        yield json.loads(line[6:])["usage"]["completion_tokens"] - chunks

        yield run


Protocol = Callable[[Load, int], AbstractAsyncContextManager[Callable[[list[int]], Arrivals]]]
PROTOCOLS: dict[str, Protocol] = {
    "yuan": lambda load, index: _yuan(load, index, is_stream=True),
    "yuan-unary": lambda load, index: _yuan(load, index, is_stream=False),
    "vllm-grpc": _vllm_grpc,
    "openai": _openai,
}
