"""Steps on a clock."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from yuan_grpc.server.core.deadline import cutoff_delay, deadline_event, with_heartbeats
from yuan_grpc.server.engine.types import StepOutput

ONE, TWO = StepOutput(cached_tokens=1), StepOutput(cached_tokens=2)


class Source:
    """Steps that come when they are let go, and then an error where one is given. It ends once it may."""

    def __init__(self, *outputs: StepOutput, error: Exception | None = None) -> None:
        self.waiting = list(outputs)
        self.error = error
        self.go = asyncio.Semaphore(0)
        self.cancelled = asyncio.Event()
        self.may_end = asyncio.Event()
        self.may_end.set()
        self.closed = asyncio.Event()

    async def outputs(self) -> AsyncGenerator[StepOutput, None]:
        try:
            for output in self.waiting:
                await self.go.acquire()
                yield output
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
    assert [output async for output in with_heartbeats(source.outputs(), None)] == [ONE, TWO]
    assert source.closed.is_set()


async def test_heartbeats_fill_the_silence_and_lose_nothing() -> None:
    source, came = Source(ONE, TWO), list[StepOutput | None]()
    async for output in with_heartbeats(source.outputs(), 0.01):
        came.append(output)
        if came.count(None) % 2 == 0:
            source.go.release()
    assert [output for output in came if output is not None] == [ONE, TWO]
    assert came[:2] == [None, None]


CLOCKS = pytest.mark.parametrize("seconds", [None, 60.0])


@CLOCKS
async def test_an_error_is_passed_on(seconds: float | None) -> None:
    with pytest.raises(KeyError):
        [output async for output in with_heartbeats(Source(error=KeyError()).outputs(), seconds)]


async def consume(source: Source, seconds: float | None, entered: asyncio.Event) -> None:
    entered.set()
    async for _ in with_heartbeats(source.outputs(), seconds):
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
    with deadline_event(0.01) as deadline:
        assert deadline
        await deadline.wait()


async def test_a_call_that_has_ended_is_cut_no_more() -> None:
    with deadline_event(0.01) as deadline:
        pass
    assert deadline
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(deadline.wait(), 0.02)


def test_a_call_without_a_deadline_is_never_cut() -> None:
    with deadline_event(None) as deadline:
        assert deadline is None


def test_a_call_is_cut_short_a_little_before_its_deadline() -> None:
    assert cutoff_delay(100) == 99.75
    assert cutoff_delay(1) == 0.9
    assert cutoff_delay(-1) == 0
