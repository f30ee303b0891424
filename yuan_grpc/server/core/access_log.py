"""The access log: one line for each call, and one for many refused calls."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

logger = logging.getLogger(__name__)

SUMMARY_SECONDS = 1.0
"""Interval between the lines about refused calls, in seconds."""

_REFUSALS = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
"""Statuses of calls that are refused by the thousand, and whose single lines are of no interest."""


class Outcome:
    """The outcome of a call, set while it runs: the request id or adapter name, and the status code."""

    def __init__(self) -> None:
        self.subject = ""
        self.code = grpc.StatusCode.CANCELLED


class _RefusalLog:
    """Counts refused calls after the first one, and logs the counts when a second has passed."""

    def __init__(self) -> None:
        self._counts = Counter[tuple[str, str]]()
        self._timer: asyncio.TimerHandle | None = None

    def is_first(self, name: str, code: str) -> bool:
        """Return whether to log a refused call by itself; count it otherwise."""
        if self._timer is not None:
            self._counts[name, code] += 1
            return False
        self._timer = asyncio.get_running_loop().call_later(SUMMARY_SECONDS, self.flush)
        return True

    def flush(self) -> None:
        """Log the counts, and log the next refused call by itself."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        for (name, code), count in self._counts.items():
            logger.info("%s: %s for %d more calls", name, code, count)
        self._counts.clear()


_refusals = _RefusalLog()
flush = _refusals.flush


@contextmanager
def log_call(name: str) -> Iterator[Outcome]:
    """Yield the call's outcome, and log it when the block ends."""
    start, outcome = time.monotonic(), Outcome()
    try:
        yield outcome
    finally:
        code = outcome.code
        if code not in _REFUSALS or _refusals.is_first(name, code.name):
            seconds = time.monotonic() - start
            logger.info("%s %.256r: %s after %.3f s", name, outcome.subject, code.name, seconds)


def log_error(error: Exception, code: grpc.StatusCode, subject: str) -> None:
    """Log the details that the status hides: the traceback of an internal error, or the cause of another."""
    if code is grpc.StatusCode.INTERNAL:
        logger.error("request %.256r failed", subject, exc_info=error)
    elif error.__cause__ and code is not grpc.StatusCode.RESOURCE_EXHAUSTED:
        logger.warning("request %.256r: %s: %r", subject, error, error.__cause__)
