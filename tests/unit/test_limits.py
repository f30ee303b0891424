"""Permits for requests of different weights."""

import asyncio

from yuan_grpc.server.core.limits import WeightedSemaphore


async def start(permits: WeightedSemaphore, weight: int) -> "asyncio.Task[int]":
    """Return a task that acquires permits, after its first step."""
    task = asyncio.create_task(permits.acquire(weight))
    await asyncio.sleep(0)
    return task


async def test_permits_are_given_in_order() -> None:
    permits = WeightedSemaphore(4)
    await permits.acquire(3)
    wide, narrow = await start(permits, 2), await start(permits, 1)
    assert not wide.done()
    assert not narrow.done()  # although it fits
    permits.release(3)
    assert [await wide, await narrow] == [2, 1]


async def test_a_weight_above_the_number_of_permits_takes_all() -> None:
    permits = WeightedSemaphore(4)
    assert await permits.acquire(2**32) == 4
    waiting = await start(permits, 0)
    assert not waiting.done()
    permits.release(4)
    assert await waiting == 1


async def test_a_cancelled_waiter_takes_no_permit() -> None:
    permits = WeightedSemaphore(2)
    await permits.acquire(2)
    first, second = await start(permits, 2), await start(permits, 1)
    first.cancel()
    permits.release(1)
    assert await second == 1


async def test_permits_are_released_after_an_error() -> None:
    permits = WeightedSemaphore(1)
    for _ in range(2):
        try:
            async with permits.hold():
                raise KeyError
        except KeyError:
            pass
