"""Steps on a clock."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from yuan_grpc.server.generation import Step
from yuan_grpc.server.pacing import cut_before, cut_off, with_heartbeats

ONE, TWO = Step(cached_tokens=1), Step(cached_tokens=2)


class Source:
    """Steps that come when they are let go, and then an error where one is given. It ends once it may."""

    def __init__(self, *steps: Step, error: Exception | None = None) -> None:
        self.waiting = list(steps)
        self.error = error
        self.go = asyncio.Semaphore(0)
        self.cancelled = asyncio.Event()
        self.may_end = asyncio.Event()
        self.may_end.set()
        self.closed = asyncio.Event()

    async def steps(self) -> AsyncGenerator[Step, None]:
        try:
            for step in self.waiting:
                await self.go.acquire()
                yield step
            if self.error:
                raise self.error
        finally:
            self.cancelled.set()
            await self.may_end.wait()
            self.closed.set()


async def test_without_a_clock_the_steps_come_as_they_are() -> None:
    source = Source(ONE, TWO)
    source.go.release()
    source.go.release()
    assert [step async for step in with_heartbeats(source.steps(), None)] == [ONE, TWO]
    assert source.closed.is_set()


async def test_heartbeats_fill_the_silence_and_lose_nothing() -> None:
    source, came = Source(ONE, TWO), list[Step | None]()
    async for step in with_heartbeats(source.steps(), 0.01):
        came.append(step)
        if came.count(None) % 2 == 0:
            source.go.release()
    assert [step for step in came if step is not None] == [ONE, TWO]
    assert came[:2] == [None, None]


CLOCKS = pytest.mark.parametrize("seconds", [None, 60.0])


@CLOCKS
async def test_an_error_is_passed_on(seconds: float | None) -> None:
    with pytest.raises(KeyError):
        [step async for step in with_heartbeats(Source(error=KeyError()).steps(), seconds)]


async def consume(source: Source, seconds: float | None, entered: asyncio.Event) -> None:
    entered.set()
    async for _ in with_heartbeats(source.steps(), seconds):
        pass


@CLOCKS
async def test_who_is_cancelled_while_waiting_frees_the_steps(seconds: float | None) -> None:
    source, entered = Source(ONE), asyncio.Event()
    task = asyncio.create_task(consume(source, seconds, entered))
    await entered.wait()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await source.closed.wait()


async def test_who_is_cancelled_again_while_the_steps_end_waits_for_them() -> None:
    source, entered = Source(ONE), asyncio.Event()
    source.may_end.clear()
    task = asyncio.create_task(consume(source, 60.0, entered))
    await entered.wait()
    await asyncio.sleep(0)
    task.cancel()
    await source.cancelled.wait()
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    source.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert source.closed.is_set()


async def test_a_call_with_a_deadline_is_cut_before_it() -> None:
    with cut_before(0.01) as cut:
        assert cut
        await cut.wait()


async def test_a_call_that_has_ended_is_cut_no_more() -> None:
    with cut_before(0.01) as cut:
        pass
    assert cut
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(cut.wait(), 0.02)


def test_a_call_without_a_deadline_is_never_cut() -> None:
    with cut_before(None) as cut:
        assert cut is None


def test_a_call_is_cut_short_a_little_before_its_deadline() -> None:
    assert cut_off(100) == 99.75
    assert cut_off(1) == 0.9
    assert cut_off(-1) == 0
