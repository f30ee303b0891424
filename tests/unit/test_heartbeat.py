"""Heartbeats in a stream of engine outputs."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from yuan_grpc.server.core.heartbeat import with_heartbeats
from yuan_grpc.server.engine.types import StepOutput

ONE, TWO = StepOutput(cached_tokens=1), StepOutput(cached_tokens=2)


class Source:
    """Outputs that are released one by one, then an error if one is given. Closing waits for `may_close`."""

    def __init__(self, *outputs: StepOutput, error: Exception | None = None) -> None:
        self.remaining = list(outputs)
        self.error = error
        self.released = asyncio.Semaphore(0)
        self.closing = asyncio.Event()
        self.may_close = asyncio.Event()
        self.may_close.set()
        self.closed = asyncio.Event()

    async def outputs(self) -> AsyncGenerator[StepOutput, None]:
        try:
            for output in self.remaining:
                await self.released.acquire()
                yield output
            if self.error:
                raise self.error
        finally:
            self.closing.set()
            await self.may_close.wait()
            self.closed.set()


async def test_without_an_interval_only_the_outputs_are_yielded() -> None:
    source = Source(ONE, TWO)
    source.released.release()
    source.released.release()
    assert [output async for output in with_heartbeats(source.outputs(), None)] == [ONE, TWO]
    assert source.closed.is_set()


async def test_heartbeats_fill_the_silence_and_no_output_is_lost() -> None:
    source, received = Source(ONE, TWO), list[StepOutput | None]()
    async for output in with_heartbeats(source.outputs(), 0.01):
        received.append(output)
        if received.count(None) % 2 == 0:
            source.released.release()
    assert [output for output in received if output is not None] == [ONE, TWO]
    assert received[:2] == [None, None]


INTERVALS = pytest.mark.parametrize("seconds", [None, 60.0])


@INTERVALS
async def test_an_error_is_passed_on(seconds: float | None) -> None:
    with pytest.raises(KeyError):
        [output async for output in with_heartbeats(Source(error=KeyError()).outputs(), seconds)]


async def consume(source: Source, seconds: float | None, entered: asyncio.Event) -> None:
    entered.set()
    async for _ in with_heartbeats(source.outputs(), seconds):
        pass


@INTERVALS
async def test_cancellation_while_waiting_closes_the_outputs(seconds: float | None) -> None:
    source, entered = Source(ONE), asyncio.Event()
    task = asyncio.create_task(consume(source, seconds, entered))
    await entered.wait()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await source.closed.wait()


async def test_a_second_cancellation_still_waits_for_the_outputs_to_close() -> None:
    source, entered = Source(ONE), asyncio.Event()
    source.may_close.clear()
    task = asyncio.create_task(consume(source, 60.0, entered))
    await entered.wait()
    await asyncio.sleep(0)
    task.cancel()
    await source.closing.wait()
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    source.may_close.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert source.closed.is_set()
