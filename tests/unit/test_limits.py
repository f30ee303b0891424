"""Slots for requests of different weights."""

import asyncio

from yuan_grpc.server.core.limits import Slots


async def start(slots: Slots, weight: int) -> "asyncio.Task[int]":
    """Return a task that acquires slots, after its first step."""
    task = asyncio.create_task(slots.acquire(weight))
    await asyncio.sleep(0)
    return task


async def test_slots_are_given_in_order() -> None:
    slots = Slots(4)
    await slots.acquire(3)
    wide, narrow = await start(slots, 2), await start(slots, 1)
    assert not wide.done()
    assert not narrow.done()  # although it fits
    slots.release(3)
    assert [await wide, await narrow] == [2, 1]


async def test_a_weight_above_the_number_of_slots_takes_all() -> None:
    slots = Slots(4)
    assert await slots.acquire(2**32) == 4
    waiting = await start(slots, 0)
    assert not waiting.done()
    slots.release(4)
    assert await waiting == 1


async def test_a_cancelled_waiter_takes_no_slot() -> None:
    slots = Slots(2)
    await slots.acquire(2)
    first, second = await start(slots, 2), await start(slots, 1)
    first.cancel()
    slots.release(1)
    assert await second == 1


async def test_slots_are_released_after_an_error() -> None:
    slots = Slots(1)
    for _ in range(2):
        try:
            async with slots.hold():
                raise KeyError
        except KeyError:
            pass
