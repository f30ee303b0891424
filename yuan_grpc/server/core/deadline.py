"""Steps on a clock: signs of life where nothing comes, and an end shortly before a deadline."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager

from yuan_grpc.server.engine.types import StepOutput

MARGIN_SECONDS = 0.25
MARGIN_SHARE = 0.1
"""So long before its deadline a call that wants what there is gets it: the answer has to travel."""


def cutoff_delay(remaining: float) -> float:
    """When to cut a call short that has so many seconds left: seconds from now."""
    return max(0.0, remaining - min(MARGIN_SECONDS, remaining * MARGIN_SHARE))


@contextmanager
def deadline_event(remaining: float | None) -> Iterator[asyncio.Event | None]:
    """Yields an event that is set shortly before so many seconds are over; None where there is no end to them."""
    if remaining is None:
        yield None
        return
    deadline = asyncio.Event()
    timer = asyncio.get_running_loop().call_later(cutoff_delay(remaining), deadline.set)
    try:
        yield deadline
    finally:
        timer.cancel()


async def with_heartbeats(
    outputs: AsyncGenerator[StepOutput, None], seconds: float | None
) -> AsyncGenerator[StepOutput | None, None]:
    """Yields the steps, and closes them when it is closed.

    Args:
        steps: of a run.
        seconds: yields None whenever so many have passed without a step; None for never.
    """
    async with aclosing(outputs):
        if seconds is None:
            async for output in outputs:
                yield output
            return
        coming: asyncio.Future[StepOutput | None] = asyncio.ensure_future(_next(outputs))
        try:
            while True:
                await asyncio.wait([coming], timeout=seconds)
                if not coming.done():
                    yield None
                elif (came := coming.result()) is not None:
                    coming = asyncio.ensure_future(_next(outputs))
                    yield came
                else:
                    return
        finally:
            await _ended(coming)


async def _next(outputs: AsyncGenerator[StepOutput, None]) -> StepOutput | None:
    return await anext(outputs, None)


async def _ended(coming: asyncio.Future[StepOutput | None]) -> None:
    """Cancels it and returns when it has ended, however often we are told to end ourselves: for as long as it runs the
    steps cannot be closed."""
    told: asyncio.CancelledError | None = None
    coming.cancel()
    while not coming.done():
        try:
            await asyncio.wait([coming])
        except asyncio.CancelledError as error:
            told = error
    if not coming.cancelled():
        coming.exception()  # which has been told to whoever waited for it, or is nobody's
    if told:
        raise told
