"""Steps on a clock."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from yuan_grpc.server.generation import Step
from yuan_grpc.server.pacing import Pause, cut_off, paced

ONE, TWO = Step(cached_tokens=1), Step(cached_tokens=2)


class Source:
    """Steps that come when they are let go, and then an error where one is given."""

    def __init__(self, *steps: Step, error: Exception | None = None) -> None:
        self.waiting = list(steps)
        self.error = error
        self.go = asyncio.Semaphore(0)
        self.closed = asyncio.Event()

    async def steps(self) -> AsyncGenerator[Step, None]:
        try:
            for step in self.waiting:
                await self.go.acquire()
                yield step
            if self.error:
                raise self.error
        finally:
            self.closed.set()


async def test_without_a_clock_the_steps_come_as_they_are() -> None:
    source = Source(ONE, TWO)
    source.go.release()
    source.go.release()
    assert [step async for step in paced(source.steps())] == [ONE, TWO]
    assert source.closed.is_set()


async def test_heartbeats_fill_the_silence_and_lose_nothing() -> None:
    source, came = Source(ONE, TWO), list[Step | Pause]()
    async for step in paced(source.steps(), heartbeat=0.01):
        came.append(step)
        if came.count(Pause.HEARTBEAT) % 2 == 0:
            source.go.release()
    assert [step for step in came if step is not Pause.HEARTBEAT] == [ONE, TWO]
    assert came[:2] == [Pause.HEARTBEAT] * 2


async def test_a_deadline_ends_the_steps_and_frees_them() -> None:
    source = Source(ONE, TWO)
    source.go.release()
    assert [step async for step in paced(source.steps(), seconds=0.05)] == [ONE, Pause.DEADLINE]
    assert source.closed.is_set()


@pytest.mark.parametrize("clock", [{}, {"heartbeat": 60.0}, {"seconds": 60.0}], ids=["none", "heartbeat", "deadline"])
async def test_an_error_is_passed_on(clock: dict[str, float]) -> None:
    with pytest.raises(KeyError):
        [step async for step in paced(Source(error=KeyError()).steps(), **clock)]


@pytest.mark.parametrize("clock", [{}, {"heartbeat": 60.0}, {"seconds": 60.0}], ids=["none", "heartbeat", "deadline"])
async def test_who_is_cancelled_while_waiting_frees_the_steps(clock: dict[str, float]) -> None:
    source = Source(ONE)
    entered = asyncio.Event()

    async def consume() -> None:
        entered.set()
        async for _ in paced(source.steps(), **clock):
            pass

    task = asyncio.create_task(consume())
    await entered.wait()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await source.closed.wait()


def test_a_call_is_cut_short_a_little_before_its_deadline() -> None:
    assert cut_off(100) == 99.75
    assert cut_off(1) == 0.9
    assert cut_off(-1) == 0
