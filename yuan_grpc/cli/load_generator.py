"""A load generator that measures throughput and latency of a server."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import random
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from yuan_grpc.cli.arrivals import Arrivals
from yuan_grpc.client import AsyncClient, YuanError
from yuan_grpc.v1 import yuan_pb2 as pb

PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
"""Name of each reported quantile -> its fraction."""
METRICS = ("ttft", "tpot", "itl", "e2el")
"""Time to first token, mean time per token after it, time between tokens, and time of the whole call."""

Send = Callable[[], Awaitable[None]]
"""Sends a request and waits for its end."""


@dataclass(frozen=True)
class Workload:
    """A description of the requests to send.

    Attributes:
        template: all fields of a request except the prompt and the request id.
        prompt_tokens: length of each prompt; its token ids are random.
        shared_prefix: number of leading tokens that all prompts share.
        seed: seed of the random token ids.
        vocab_size: upper limit of the token ids, exclusive.
    """

    template: pb.GenerateRequest
    prompt_tokens: int
    shared_prefix: int
    seed: int
    vocab_size: int

    def requests(self, name: str) -> Iterator[pb.GenerateRequest]:
        """Yield an endless series of requests. Each name yields different prompts with the same prefix."""
        run_id = uuid.uuid4().hex[:8]
        prefix = self._random_token_ids("prefix", self.shared_prefix)
        for number in itertools.count():
            request = pb.GenerateRequest(request_id=f"bench-{run_id}-{number}")
            request.MergeFrom(self.template)
            suffix = self._random_token_ids(f"{name}/{number}", self.prompt_tokens - self.shared_prefix)
            request.prompt_token_ids.ids.extend(prefix + suffix)
            yield request

    def _random_token_ids(self, name: str, count: int) -> list[int]:
        return random.Random(f"{self.seed}/{name}").choices(range(self.vocab_size), k=count)


@dataclass(frozen=True)
class Level:
    """A load.

    Attributes:
        label: its name in tables.
        concurrency: number of concurrent requests; with arrivals the maximum, or None for no maximum.
        arrivals: when requests start; None to start one whenever another has ended.
    """

    label: str
    concurrency: int | None
    arrivals: Arrivals | None = None


class RequestTimer:
    """Arrival times of the tokens of one request.

    Attributes:
        ttft: seconds from the call to its first token; None before that.
        itls: seconds between tokens. A message of k tokens counts as k gaps, each 1/k of the time since the previous
            message.
        e2el: seconds from the call to its end; None before that.
        output_tokens: number of tokens received.
    """

    def __init__(self) -> None:
        self._start = self._last_arrival = time.monotonic()
        self.ttft: float | None = None
        self.itls: list[float] = []
        self.e2el: float | None = None
        self.output_tokens = 0

    @property
    def tpot(self) -> float | None:
        """Mean seconds per token after the first one; None with fewer than two tokens, and before the end."""
        if self.ttft is None or self.e2el is None or self.output_tokens < 2:
            return None
        return (self.e2el - self.ttft) / (self.output_tokens - 1)

    def record(self, message: pb.GenerateStreamResponse) -> None:
        """Record the arrival of a message."""
        tokens = sum(len(choice.token_ids) for choice in message.choices)
        if not tokens:
            return
        now = time.monotonic()
        if self.ttft is None:
            self.ttft = now - self._last_arrival
        else:
            self.itls += [(now - self._last_arrival) / tokens] * tokens
        self._last_arrival = now
        self.output_tokens += tokens

    def end(self) -> None:
        """Record the end of the call."""
        self.e2el = time.monotonic() - self._start

    def is_good(self, targets: Mapping[str, float]) -> bool:
        """Return whether the request met its targets: milliseconds by metric. A metric without a value meets any."""
        values = {"ttft": self.ttft, "tpot": self.tpot, "itl": quantile(self.itls, 0.99), "e2el": self.e2el}
        return all((values[name] or 0) * 1000 <= target for name, target in targets.items())


class TimingInterceptor(grpc.aio.UnaryStreamClientInterceptor):
    """A client interceptor that passes stream messages to timers, by request id. The client itself yields only text."""

    def __init__(self) -> None:
        self.timers: dict[str, RequestTimer] = {}

    async def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        """Return the call; if the request has a timer, record each message first."""
        call = await continuation(details, request)
        timer = self.timers.get(request.request_id)
        return call if timer is None else self._record(call, timer)

    async def _record(self, call: Any, timer: RequestTimer) -> AsyncIterator[Any]:
        async for message in call:
            if message is not None:  # gRPC could not parse it; the client raises
                timer.record(message)
            yield message


@dataclass(frozen=True)
class Measurement:
    """Results of one level; times in seconds.

    Attributes:
        level: the load.
        seconds: time from the start of the first request to the end of the last.
        timers: timer of each successful request.
        errors: number of failed requests by status name.
    """

    level: Level
    seconds: float
    timers: Sequence[RequestTimer]
    errors: Counter[str]

    @property
    def completed(self) -> int:
        """Number of successful requests."""
        return len(self.timers)

    @property
    def output_tokens(self) -> int:
        """Number of tokens that successful requests generated."""
        return sum(timer.output_tokens for timer in self.timers)

    @property
    def requests_per_second(self) -> float:
        """Rate of successful requests."""
        return self.completed / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Rate of generated tokens over all successful requests."""
        return self.output_tokens / self.seconds

    def times(self, metric: str) -> list[float]:
        """Return the values of a metric of `METRICS` over all successful requests."""
        if metric == "itl":
            return [itl for timer in self.timers for itl in timer.itls]
        values = (getattr(timer, metric) for timer in self.timers)
        return [value for value in values if value is not None]

    def good_requests(self, targets: Mapping[str, float]) -> int:
        """Return the number of requests that met all targets: milliseconds by metric."""
        return sum(timer.is_good(targets) for timer in self.timers)


def quantile(values: Sequence[float], fraction: float) -> float | None:
    """Return the nearest-rank quantile; None if there are no values."""
    return sorted(values)[max(0, math.ceil(fraction * len(values)) - 1)] if values else None


async def run_request(client: AsyncClient, interceptor: TimingInterceptor, request: pb.GenerateRequest) -> RequestTimer:
    """Stream a request to its end and return its timer.

    Raises:
        YuanError: the call failed.
    """
    timer = interceptor.timers[request.request_id] = RequestTimer()
    try:
        async with client.stream(request) as stream:
            async for _ in stream:
                pass
        timer.end()
    finally:
        del interceptor.timers[request.request_id]
    return timer


async def measure(
    client: AsyncClient,
    interceptor: TimingInterceptor,
    requests: Iterator[pb.GenerateRequest],
    level: Level,
    *,
    limit: int | None,
    seconds: float,
    on_request_end: Callable[[], None],
) -> Measurement:
    """Send requests as the level says until the limit, then wait for the running ones.

    Args:
        client: a client that uses the interceptor.
        interceptor: times the client's calls.
        requests: the requests to send.
        level: the number of concurrent requests, or their arrivals.
        limit: number of requests; None to start requests until the time is up.
        seconds: time after which no request starts; ignored if there is a limit.
        on_request_end: called after each request.
    """
    timers: list[RequestTimer] = []
    errors = Counter[str]()
    start = time.monotonic()

    async def send() -> None:
        try:
            timers.append(await run_request(client, interceptor, next(requests)))
        except YuanError as error:
            errors[error.code.name] += 1
        on_request_end()

    if level.arrivals is None:
        await _send_concurrently(send, level.concurrency or 1, limit, start + seconds)
    else:
        await _send_at(level.arrivals.times(limit, seconds), send, level.concurrency)
    return Measurement(level, time.monotonic() - start, timers, errors)


async def _send_concurrently(send: Send, concurrency: int, limit: int | None, end: float) -> None:
    numbers = itertools.count()

    async def worker() -> None:
        while next(numbers) < limit if limit is not None else time.monotonic() < end:
            await send()

    await asyncio.gather(*(worker() for _ in range(concurrency)))


async def _send_at(times: Iterator[float], send: Send, concurrency: int | None) -> None:
    """Send a request at each time, in seconds from now; wait at the limit of concurrent ones, if there is one."""
    start, tasks = time.monotonic(), list[asyncio.Task[None]]()
    permits = asyncio.Semaphore(concurrency) if concurrency else contextlib.nullcontext()

    async def send_with_permit() -> None:
        async with permits:
            await send()

    try:
        for at in times:
            await asyncio.sleep(start + at - time.monotonic())
            tasks.append(asyncio.create_task(send_with_permit()))
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
