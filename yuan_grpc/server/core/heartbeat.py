"""Heartbeats in a stream of engine outputs."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from yuan_grpc.server.engine.types import StepOutput


async def with_heartbeats(
    outputs: AsyncGenerator[StepOutput, None], seconds: float | None
) -> AsyncGenerator[StepOutput | None, None]:
    """Yield the outputs, and None each time `seconds` pass without one. Closing it closes the outputs.

    Args:
        outputs: the engine's, or a strategy's.
        seconds: the interval; None for no heartbeats.
    """
    async with aclosing(outputs):
        if seconds is None:
            async for output in outputs:
                yield output
            return
        pending = asyncio.ensure_future(_next(outputs))
        try:
            while True:
                await asyncio.wait([pending], timeout=seconds)
                if not pending.done():
                    yield None
                elif (result := pending.result()) is not None:
                    pending = asyncio.ensure_future(_next(outputs))
                    yield result
                else:
                    return
        finally:
            await _cancel(pending)


async def _next(outputs: AsyncGenerator[StepOutput, None]) -> StepOutput | None:
    return await anext(outputs, None)


async def _cancel(pending: asyncio.Future[StepOutput | None]) -> None:
    """Cancel the pending read and wait for its end, even if cancelled repeatedly.

    The outputs cannot be closed while a read is pending.
    """
    cancellation: asyncio.CancelledError | None = None
    pending.cancel()
    while not pending.done():
        try:
            await asyncio.wait([pending])
        except asyncio.CancelledError as error:
            cancellation = error
    if not pending.cancelled():
        pending.exception()  # marks it as retrieved: the caller has it already, or has disconnected
    if cancellation:
        raise cancellation
