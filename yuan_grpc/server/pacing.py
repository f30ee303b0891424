"""Steps on a clock: what comes in time, and signs of life or of the end where nothing does."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from enum import Enum

from yuan_grpc.server.generation import Step

MARGIN_SECONDS = 0.25
MARGIN_SHARE = 0.1
"""So long before its deadline a call that wants what there is gets it: the answer has to travel."""


class Pause(Enum):
    """Why there is no step."""

    HEARTBEAT = "heartbeat"
    DEADLINE = "deadline"


def cut_off(remaining: float) -> float:
    """When to cut a call short that has so many seconds left: seconds from now."""
    return max(0.0, remaining - min(MARGIN_SECONDS, remaining * MARGIN_SHARE))


async def paced(
    steps: AsyncGenerator[Step, None], *, heartbeat: float | None = None, seconds: float | None = None
) -> AsyncGenerator[Step | Pause, None]:
    """Yields the steps, and closes them when it is closed.

    Args:
        steps: of a run.
        heartbeat: yields `HEARTBEAT` when so many seconds have passed without a step; None for never.
        seconds: yields `DEADLINE` after so many, and nothing more; None for never.
    """
    async with aclosing(steps):
        if heartbeat is None and seconds is None:
            async for step in steps:
                yield step
            return
        loop = asyncio.get_running_loop()
        end = None if seconds is None else loop.time() + seconds
        coming: asyncio.Future[Step | None] = asyncio.ensure_future(_next(steps))
        try:
            while True:
                left = None if end is None else max(0.0, end - loop.time())
                waits = [wait for wait in (heartbeat, left) if wait is not None]
                await asyncio.wait([coming], timeout=min(waits))
                if coming.done():
                    if (came := coming.result()) is None:
                        return
                    coming = asyncio.ensure_future(_next(steps))
                    yield came
                elif end is not None and loop.time() >= end:
                    yield Pause.DEADLINE
                    return
                else:
                    yield Pause.HEARTBEAT
        finally:
            coming.cancel()
            await asyncio.wait([coming])
            if not coming.cancelled():
                coming.exception()  # which has been told to whoever waited for it, or is nobody's


async def _next(steps: AsyncGenerator[Step, None]) -> Step | None:
    return await anext(steps, None)
