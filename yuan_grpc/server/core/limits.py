"""Limits on requests that gRPC and HTTP share."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

MAX_IN_FLIGHT = 64
"""Choices, and beams, of one call that run at a time."""
MAX_REQUEST_ID = 256
MAX_MESSAGES = 1024
MAX_TOKENIZE = 2**17
"""Characters, or ids: more than any model's context, in a response of a few megabytes."""
MAX_INLINE_CHARACTERS = 16_384
"""Length of the longest text whose tokenization needs no turn: it takes a few milliseconds."""
MAX_BEAMS = 256
"""Beams that run at a time, over all searches."""
MAX_BEAM_REQUESTS = 32
"""Engine requests of beams that run at a time, over all searches. Each takes about 1 ms of the event loop per step."""


class Slots:
    """A semaphore that gives several slots at once, first come, first served.

    Args:
        count: number of slots.
    """

    def __init__(self, count: int) -> None:
        self._count = self._free = count
        self._turn = asyncio.Lock()
        self._released = asyncio.Event()

    async def acquire(self, weight: int = 1) -> int:
        """Wait for `weight` slots, or for all if there are fewer; return their number, to be released later."""
        weight = min(max(1, weight), self._count)
        async with self._turn:
            while self._free < weight:
                self._released.clear()
                await self._released.wait()
            self._free -= weight
        return weight

    def release(self, weight: int = 1) -> None:
        """Give slots back."""
        self._free += weight
        self._released.set()

    @asynccontextmanager
    async def hold(self, weight: int = 1) -> AsyncGenerator[None, None]:
        """Hold slots during the block."""
        weight = await self.acquire(weight)
        try:
            yield
        finally:
            self.release(weight)


class BeamSlots:
    """The limits on all beam searches of a server.

    Attributes:
        beams: a slot for each beam of a running search.
        requests: a slot for each engine request of a beam.
    """

    def __init__(self, beams: int = MAX_BEAMS, requests: int = MAX_BEAM_REQUESTS) -> None:
        self.beams = Slots(beams)
        self.requests = Slots(requests)
