"""A load generator that measures throughput and latency of a server."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from yuan_grpc.client import AsyncClient, YuanError
from yuan_grpc.v1 import yuan_pb2 as pb

QUANTILES = (0.5, 0.9, 0.99)


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
        """Yield an endless series of requests. Each name gives other prompts with the same prefix."""
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


class RequestTimer:
    """Arrival times of the tokens of one request.

    Attributes:
        ttft: seconds from the call to its first token; None before that.
        itls: seconds between tokens. A message of k tokens counts as k gaps, each 1/k of the time since the previous
            message.
        output_tokens: number of tokens received.
    """

    def __init__(self) -> None:
        self._last_arrival = time.monotonic()
        self.ttft: float | None = None
        self.itls: list[float] = []
        self.output_tokens = 0

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
    """Results of one concurrency level; times in seconds.

    Attributes:
        concurrency: number of concurrent requests.
        seconds: time from the start of the first request to the end of the last.
        completed: number of successful requests.
        errors: number of failed requests by status name.
        output_tokens: number of tokens that successful requests generated.
        ttfts: time to first token of each successful request.
        itls: times between tokens of successful requests.
    """

    concurrency: int
    seconds: float
    completed: int
    errors: Counter[str]
    output_tokens: int
    ttfts: Sequence[float]
    itls: Sequence[float]

    @property
    def requests_per_second(self) -> float:
        """Rate of successful requests."""
        return self.completed / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Rate of generated tokens over all successful requests."""
        return self.output_tokens / self.seconds


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
    finally:
        del interceptor.timers[request.request_id]
    return timer


async def measure(
    client: AsyncClient,
    interceptor: TimingInterceptor,
    requests: Iterator[pb.GenerateRequest],
    *,
    concurrency: int,
    limit: int | None,
    seconds: float,
    on_request_end: Callable[[], None],
) -> Measurement:
    """Keep a fixed number of requests running until the limit, then wait for the running ones.

    Args:
        client: a client that uses the interceptor.
        interceptor: times the client's calls.
        requests: the requests to send.
        concurrency: number of concurrent requests.
        limit: number of requests; None to start requests until the time is up.
        seconds: time after which no request starts; ignored if there is a limit.
        on_request_end: called after each request.
    """
    timers: list[RequestTimer] = []
    errors = Counter[str]()
    start = time.monotonic()
    numbers = itertools.count()

    async def worker() -> None:
        while next(numbers) < limit if limit is not None else time.monotonic() < start + seconds:
            try:
                timers.append(await run_request(client, interceptor, next(requests)))
            except YuanError as error:
                errors[error.code.name] += 1
            on_request_end()

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return Measurement(
        concurrency=concurrency,
        seconds=time.monotonic() - start,
        completed=len(timers),
        errors=errors,
        output_tokens=sum(timer.output_tokens for timer in timers),
        ttfts=[timer.ttft for timer in timers if timer.ttft is not None],
        itls=[itl for timer in timers for itl in timer.itls],
    )
