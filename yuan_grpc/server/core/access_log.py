"""The access log: one line for each call."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

logger = logging.getLogger(__name__)


class Outcome:
    """The outcome of a call, set while it runs: the request id or adapter name, and the status code."""

    def __init__(self) -> None:
        self.subject = ""
        self.code = grpc.StatusCode.CANCELLED


@contextmanager
def log_call(name: str) -> Iterator[Outcome]:
    """Yield the call's outcome, and log it when the block ends."""
    start, outcome = time.monotonic(), Outcome()
    try:
        yield outcome
    finally:
        seconds = time.monotonic() - start
        logger.info("%s %.256r: %s after %.3f s", name, outcome.subject, outcome.code.name, seconds)


def log_error(error: Exception, code: grpc.StatusCode, subject: str) -> None:
    """Log the details that the status hides: the traceback of an internal error, or the cause of another."""
    if code is grpc.StatusCode.INTERNAL:
        logger.error("request %.256r failed", subject, exc_info=error)
    elif error.__cause__:
        logger.warning("request %.256r: %s: %r", subject, error, error.__cause__)
