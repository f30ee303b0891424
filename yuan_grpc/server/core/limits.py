"""Limits on requests that gRPC and HTTP share."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

MAX_IN_FLIGHT = 64
"""Choices, and beams, of one call that run at a time."""
MAX_REQUEST_ID = 256
"""Characters of a request id."""
MAX_MESSAGES = 1024
"""Messages of a conversation."""
MAX_TOKENIZE = 2**17
"""Characters, or ids: more than any model's context, in a response of a few megabytes."""
MAX_INLINE_CHARACTERS = 16_384
"""Length of the longest text whose tokenization needs no permit: it takes a few milliseconds."""
MAX_BEAMS = 256
"""Beams that run at a time, over all searches."""
MAX_BEAM_REQUESTS = 32
"""Engine requests of beams that run at a time, over all searches. Each takes about 1 ms of the event loop per step."""


class WeightedSemaphore:
    """A semaphore that gives several permits at once, first come, first served.

    Args:
        count: number of permits.
    """

    def __init__(self, count: int) -> None:
        self._count = self._free = count
        self._first_in_line = asyncio.Lock()
        self._released = asyncio.Event()

    async def acquire(self, weight: int = 1) -> int:
        """Wait for `weight` permits, or for all if there are fewer; return their number, to be released later."""
        weight = min(max(1, weight), self._count)
        async with self._first_in_line:
            while self._free < weight:
                self._released.clear()
                await self._released.wait()
            self._free -= weight
        return weight

    def release(self, weight: int = 1) -> None:
        """Give permits back."""
        self._free += weight
        self._released.set()

    @asynccontextmanager
    async def hold(self, weight: int = 1) -> AsyncGenerator[None, None]:
        """Hold permits during the block."""
        weight = await self.acquire(weight)
        try:
            yield
        finally:
            self.release(weight)


class BeamLimits:
    """The limits on all beam searches of a server.

    Attributes:
        beams: a permit for each beam of a running search.
        requests: a permit for each engine request of a beam.
    """

    def __init__(self, beams: int = MAX_BEAMS, requests: int = MAX_BEAM_REQUESTS) -> None:
        self.beams = WeightedSemaphore(beams)
        self.requests = WeightedSemaphore(requests)
