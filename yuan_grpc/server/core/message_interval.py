"""Pauses between the messages of a stream, in which the engine merges tokens."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

from yuan_grpc.server.engine.types import StepOutput


async def with_pauses(
    outputs: AsyncGenerator[StepOutput, None], seconds: float, deadline: asyncio.Event | None
) -> AsyncGenerator[StepOutput, None]:
    """Yield the outputs, with a pause after each that has tokens. Closing it closes the outputs.

    The tokens of a pause are in one output after it. No pause follows the end of a choice. The deadline ends a pause.

    Args:
        outputs: the engine's, or a strategy's, which merge what is not read.
        seconds: the length of a pause.
        deadline: set when the partial output must be sent; None for never.
    """
    async with aclosing(outputs):
        async for output in outputs:
            yield output
            if output.deltas and not any(delta.finish_reason for delta in output.deltas):
                await _pause(seconds, deadline)


async def _pause(seconds: float, deadline: asyncio.Event | None) -> None:
    if deadline is None:
        await asyncio.sleep(seconds)
        return
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await deadline.wait()
