"""A watchdog for an engine that stops making progress without dying, such as one with a hanging GPU."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing

from yuan_grpc.server.engine.protocol import Engine
from yuan_grpc.server.engine.types import EngineRequest, Sampling
from yuan_grpc.server.errors import ServiceError
from yuan_grpc.server.settings.lifecycle import LifecycleSettings

logger = logging.getLogger(__name__)

CHECKS = 10
"""Number of consecutive checks without progress that make a stall.

Checks are counted, not seconds: a server that was suspended itself has made none.
"""
MAX_INTERVAL = 1.0
"""Maximum interval between checks for the end of a stall, in seconds."""


class Watchdog:
    """Watches an engine that has started.

    Args:
        engine: the engine.
        settings: the times.
        on_stall: called when the engine has made no progress for too long although it has requests.
        on_recovery: called when it makes progress again.
    """

    def __init__(
        self,
        engine: Engine,
        settings: LifecycleSettings,
        on_stall: Callable[[], Awaitable[None]],
        on_recovery: Callable[[], Awaitable[None]],
    ) -> None:
        self._engine = engine
        self._interval = settings.stall_seconds / CHECKS
        self._settings = settings
        self._on_stall = on_stall
        self._on_recovery = on_recovery

    async def run(self) -> None:
        """Return when a stall has lasted so long that the server must exit. Runs forever if it is never to exit."""
        if not self._settings.stall_seconds:
            await asyncio.Event().wait()
        while True:
            await self._wait_for_stall()
            logger.error("the engine makes no progress: health is NOT_SERVING, and new calls are refused")
            await self._on_stall()
            if not await self._wait_for_recovery():
                return
            logger.info("the engine makes progress again")
            await self._on_recovery()

    async def _wait_for_stall(self) -> None:
        checks, progress = 0, self._engine.progress
        while checks < CHECKS:
            await asyncio.sleep(self._interval)
            is_stuck = self._engine.is_busy and self._engine.progress == progress
            checks, progress = checks + 1 if is_stuck else 0, self._engine.progress

    async def _wait_for_recovery(self) -> bool:
        """Return True when the engine makes progress, or False after `stall_exit_seconds`.

        A request of the watchdog waits in the engine: those of callers may all have been cancelled meanwhile.
        """
        progress, seconds, limit = self._engine.progress, 0.0, self._settings.stall_exit_seconds
        interval = min(MAX_INTERVAL, self._interval)
        probe = asyncio.ensure_future(self._send_request())
        try:
            while self._engine.progress == progress:
                if limit is not None and seconds >= limit:
                    return False
                await asyncio.sleep(interval)
                seconds += interval
            return True
        finally:
            probe.cancel()

    async def _send_request(self) -> None:
        request = EngineRequest("watchdog", [0], Sampling(max_tokens=1, temperature=0))
        while True:
            try:
                async with aclosing(self._engine.generate(request, stream=False)) as outputs:
                    async for _ in outputs:
                        pass
                return
            except ServiceError as error:  # the queue is full, or the engine has died
                logger.debug("the watchdog's request failed: %s", error)
                await asyncio.sleep(self._interval)
