"""Delays before a request that the full queue of the engine rejected is sent again."""

import asyncio
from random import uniform

RETRY_SECONDS = 0.05
"""First delay, in seconds. Other requests free capacity meanwhile."""
MAX_RETRY_SECONDS = 2
"""Limit on the delay, which doubles with each rejection."""


class Backoff:
    """The delays of one request."""

    def __init__(self) -> None:
        self._seconds: float = RETRY_SECONDS

    async def wait(self) -> None:
        """Wait at random between half of the delay and all of it, and double it."""
        await asyncio.sleep(uniform(self._seconds / 2, self._seconds))
        self._seconds = min(2 * self._seconds, MAX_RETRY_SECONDS)
