"""The end of a request shortly before its deadline, for a partial result."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

MARGIN_SECONDS = 0.25
MARGIN_SHARE = 0.1
"""Share of the remaining time that is left for the response to reach the client, at most `MARGIN_SECONDS`."""


def cutoff_delay(remaining: float) -> float:
    """Return the delay until generation must end, in seconds, given the seconds until the deadline."""
    return max(0.0, remaining - min(MARGIN_SECONDS, remaining * MARGIN_SHARE))


@contextmanager
def deadline_event(remaining: float | None) -> Iterator[asyncio.Event | None]:
    """Yield an event that is set shortly before the deadline; None without a deadline.

    Args:
        remaining: seconds until the deadline; None without one.
    """
    if remaining is None:
        yield None
        return
    deadline = asyncio.Event()
    timer = asyncio.get_running_loop().call_later(cutoff_delay(remaining), deadline.set)
    try:
        yield deadline
    finally:
        timer.cancel()
