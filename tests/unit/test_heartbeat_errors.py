"""Errors of engine outputs that arrive when their reader has gone."""

import asyncio
import gc
from collections.abc import AsyncGenerator
from typing import Any

from yuan_grpc.server.core.heartbeat import with_heartbeats
from yuan_grpc.server.engine.types import StepOutput


async def failing_outputs(reading: asyncio.Event) -> AsyncGenerator[StepOutput, None]:
    """Fail when the read is cancelled."""
    try:
        reading.set()
        await asyncio.Event().wait()
        yield StepOutput()
    except asyncio.CancelledError:
        raise ValueError("the engine failed") from None


async def test_an_error_after_a_cancellation_is_not_reported_as_lost() -> None:
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    reading = asyncio.Event()

    async def consume() -> None:
        async for _ in with_heartbeats(failing_outputs(reading), 60.0):
            pass

    task = asyncio.create_task(consume())
    await reading.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    del task
    await asyncio.sleep(0)
    gc.collect()  # asyncio reports an error when its future is deleted
    assert reported == []
