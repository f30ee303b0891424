"""Load on a server, and what it measures of it."""

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

SHARES = (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Shape:
    """What the requests of a measurement are like.

    Attributes:
        request: all but the prompt.
        prompt_tokens: of each prompt, drawn at random.
        shared_prefix: so many of them, at the beginning, are the same in all prompts.
        seed: what they are drawn with.
        vocabulary: how many token ids there are.
    """

    request: pb.GenerateRequest
    prompt_tokens: int
    shared_prefix: int
    seed: int
    vocabulary: int

    def requests(self, name: str) -> Iterator[pb.GenerateRequest]:
        """Requests without end; another name has other prompts."""
        run = uuid.uuid4().hex[:8]
        prefix = self._drawn("prefix", self.shared_prefix)
        for number in itertools.count():
            request = pb.GenerateRequest(request_id=f"bench-{run}-{number}")
            request.MergeFrom(self.request)
            own = self._drawn(f"{name}/{number}", self.prompt_tokens - self.shared_prefix)
            request.prompt_token_ids.ids.extend(prefix + own)
            yield request

    def _drawn(self, name: str, count: int) -> list[int]:
        return random.Random(f"{self.seed}/{name}").choices(range(self.vocabulary), k=count)


class Clock:
    """When the tokens of a call came.

    Attributes:
        first: seconds from the call to its first token; None before that.
        gaps: seconds between tokens. A message of k tokens after a pause counts as k gaps of a k-th of it each.
        tokens: how many came.
    """

    def __init__(self) -> None:
        self._last = time.monotonic()
        self.first: float | None = None
        self.gaps: list[float] = []
        self.tokens = 0

    def saw(self, part: pb.GenerateStreamResponse) -> None:
        """A message has come."""
        tokens = sum(len(choice.token_ids) for choice in part.choices)
        if not tokens:
            return
        now = time.monotonic()
        if self.first is None:
            self.first = now - self._last
        else:
            self.gaps += [(now - self._last) / tokens] * tokens
        self._last = now
        self.tokens += tokens


class Timing(grpc.aio.UnaryStreamClientInterceptor):
    """Shows the messages of streams to clocks, by the request's name: the client shows only text."""

    def __init__(self) -> None:
        self.clocks: dict[str, Clock] = {}

    async def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        """gRPC's hook: the call's messages, each seen by the clock first."""
        call = await continuation(details, request)
        clock = self.clocks.get(request.request_id)
        return call if clock is None else self._seen(call, clock)

    async def _seen(self, call: Any, clock: Clock) -> AsyncIterator[Any]:
        async for part in call:
            clock.saw(part)
            yield part


@dataclass(frozen=True)
class Measurement:
    """What came of a load; times in seconds.

    Attributes:
        concurrency: how many requests ran at a time.
        seconds: from the first request to the last answer's end.
        answered: requests that ended well.
        errors: how many requests ended with a status, by its name.
        tokens: that were generated for those that ended well.
        first: from each call to its first token.
        gaps: between tokens.
    """

    concurrency: int
    seconds: float
    answered: int
    errors: Counter[str]
    tokens: int
    first: Sequence[float]
    gaps: Sequence[float]

    @property
    def requests_per_second(self) -> float:
        """Of requests that ended well."""
        return self.answered / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Generated, over all requests."""
        return self.tokens / self.seconds


def percentile(values: Sequence[float], share: float) -> float | None:
    """The least value that this share of them does not exceed; None of none."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else None


async def ask(client: AsyncClient, timing: Timing, request: pb.GenerateRequest) -> Clock:
    """Streams an answer; returns when its tokens came.

    Raises:
        YuanError: the call did not end well.
    """
    clock = timing.clocks[request.request_id] = Clock()
    try:
        async with client.stream(request) as stream:
            async for _ in stream:
                pass
    finally:
        del timing.clocks[request.request_id]
    return clock


async def measure(
    client: AsyncClient,
    timing: Timing,
    requests: Iterator[pb.GenerateRequest],
    *,
    concurrency: int,
    limit: int | None,
    seconds: float,
    advance: Callable[[], None],
) -> Measurement:
    """Keeps so many requests running at a time until the end, and waits for those that have begun.

    Args:
        client: made with `timing` among its interceptors.
        timing: sees the client's calls.
        requests: what to send.
        concurrency: how many run at a time.
        limit: how many requests there are; None for as many as fit into the time.
        seconds: after which no other request begins, where there is no limit.
        advance: is called when a request has ended.
    """
    clocks: list[Clock] = []
    errors = Counter[str]()
    began = time.monotonic()
    numbers = itertools.count()

    async def work() -> None:
        while next(numbers) < limit if limit is not None else time.monotonic() < began + seconds:
            try:
                clocks.append(await ask(client, timing, next(requests)))
            except YuanError as error:
                errors[error.code.name] += 1
            advance()

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return Measurement(
        concurrency=concurrency,
        seconds=time.monotonic() - began,
        answered=len(clocks),
        errors=errors,
        tokens=sum(clock.tokens for clock in clocks),
        first=[clock.first for clock in clocks if clock.first is not None],
        gaps=[gap for clock in clocks for gap in clock.gaps],
    )
