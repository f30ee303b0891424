"""Pauses between the messages of a stream."""

import asyncio
from collections.abc import AsyncGenerator

import pytest
from fake_engine import last, more

from yuan_grpc.server.core.message_interval import with_pauses
from yuan_grpc.server.engine.types import StepOutput

ENDLESS = 3600.0
OUTPUTS = [StepOutput(), more("a"), more("b"), last("c")]


async def read(outputs: AsyncGenerator[StepOutput, None], count: int) -> list[StepOutput]:
    return [await anext(outputs) for _ in range(count)]


class Source:
    """Outputs that are ready at once."""

    def __init__(self) -> None:
        self.is_closed = False

    async def outputs(self) -> AsyncGenerator[StepOutput, None]:
        try:
            for output in OUTPUTS:
                yield output
        finally:
            self.is_closed = True


async def is_waiting(task: asyncio.Future[StepOutput]) -> bool:
    """Return whether a read waits although its output is ready."""
    for _ in range(5):
        await asyncio.sleep(0)
    return not task.done()


async def test_the_first_tokens_are_sent_at_once_and_the_next_ones_after_a_pause() -> None:
    outputs = with_pauses(Source().outputs(), ENDLESS, None)
    assert await read(outputs, 2) == OUTPUTS[:2]
    pending = asyncio.ensure_future(anext(outputs))
    assert await is_waiting(pending)
    pending.cancel()
    await asyncio.wait([pending])


async def test_all_outputs_are_yielded_in_order() -> None:
    assert [output async for output in with_pauses(Source().outputs(), 0.001, None)] == OUTPUTS


async def test_the_deadline_ends_a_pause_and_prevents_more() -> None:
    deadline = asyncio.Event()
    outputs = with_pauses(Source().outputs(), ENDLESS, deadline)
    await read(outputs, 2)
    pending = asyncio.ensure_future(anext(outputs))
    assert await is_waiting(pending)
    deadline.set()
    assert await pending == OUTPUTS[2]
    assert await read(outputs, 1) == OUTPUTS[3:]


async def test_no_pause_follows_the_end_of_a_choice() -> None:
    deadline = asyncio.Event()
    outputs = with_pauses(Source().outputs(), ENDLESS, deadline)
    deadline.set()
    await read(outputs, 4)
    deadline.clear()
    with pytest.raises(StopAsyncIteration):
        await anext(outputs)


@pytest.mark.parametrize("count", [1, 2])
async def test_closing_it_closes_the_outputs(count: int) -> None:
    source = Source()
    outputs = with_pauses(source.outputs(), ENDLESS, None)
    await read(outputs, count)
    await outputs.aclose()
    assert source.is_closed


async def test_cancelling_a_pause_closes_the_outputs() -> None:
    source = Source()
    outputs = with_pauses(source.outputs(), ENDLESS, None)
    await read(outputs, 2)
    pending = asyncio.ensure_future(anext(outputs))
    assert await is_waiting(pending)
    pending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pending
    assert source.is_closed
