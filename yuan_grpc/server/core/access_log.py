"""The access log: one line for each call."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

logger = logging.getLogger(__name__)


class Outcome:
    """What is to be logged of a call, filled in when it is known: the name of a request or an adapter, and the end."""

    def __init__(self) -> None:
        self.subject = ""
        self.code = grpc.StatusCode.CANCELLED


@contextmanager
def log_call(name: str) -> Iterator[Outcome]:
    """Leaves one line in the log when the call ends, however it does."""
    began, outcome = time.monotonic(), Outcome()
    try:
        yield outcome
    finally:
        seconds = time.monotonic() - began
        logger.info("%s %.256r: %s after %.3f s", name, outcome.subject, outcome.code.name, seconds)


def log_error(error: Exception, code: grpc.StatusCode, subject: str) -> None:
    """Tells the log what the caller, who gets the code, is not told."""
    if code is grpc.StatusCode.INTERNAL:
        logger.error("request %.256r failed", subject, exc_info=error)
    elif error.__cause__:
        logger.warning("request %.256r: %s: %r", subject, error, error.__cause__)
