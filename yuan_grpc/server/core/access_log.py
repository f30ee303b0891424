"""The access log: one line for each call, and one for many refused calls."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import grpc

from yuan_grpc.server.engine.types import StepOutput
from yuan_grpc.server.errors import InvalidRequestError
from yuan_grpc.server.security.identity import current_identity

logger = logging.getLogger(__name__)

SUMMARY_SECONDS = 1.0
"""Interval between the lines about refused calls, in seconds."""

_REFUSALS = (
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
)
"""Statuses of calls that are refused by the thousand, and whose single lines are of no interest."""


class Outcome:
    """The outcome of a call, set while it runs.

    Attributes:
        subject: the request id or adapter name.
        code: the status code.
        peer: the address of the caller.
        model: the name of the model or adapter that generates.
        caller: the name of the caller's token or certificate; empty if it is anonymous.
        wait_seconds: time until the engine got the request.
    """

    def __init__(self) -> None:
        self.subject = ""
        self.code = grpc.StatusCode.CANCELLED
        self.peer = ""
        self.model = ""
        self.caller = current_identity().name
        self.wait_seconds = 0.0
        self._fields: list[str] = []
        self._prompt_tokens = self._completion_tokens = 0
        self._queue_seconds: float | None = None
        self._first_token_seconds: float | None = None

    def set_error(self, error: Exception, code: grpc.StatusCode) -> None:
        """Set the code of an error, and the fields that it names."""
        self.code = code
        if isinstance(error, InvalidRequestError):
            self._fields = [violation.field for violation in error.violations if violation.field]

    def begin(self, model: str, prompt_tokens: int) -> None:
        """Record that a prompt has been accepted; an HTTP request may have several."""
        self.model = model
        self._prompt_tokens += prompt_tokens

    def observe(self, output: StepOutput) -> None:
        """Record the tokens of an output, and the times of the first one."""
        self._completion_tokens += sum(len(delta.token_ids) for delta in output.deltas) + output.discarded_tokens
        if self._queue_seconds is None:
            self._queue_seconds = _later(output.queue_seconds, self.wait_seconds)
            self._first_token_seconds = _later(output.first_token_seconds, self.wait_seconds)

    @property
    def completion_tokens(self) -> int:
        """Number of tokens generated so far, over all choices."""
        return self._completion_tokens

    def describe(self) -> str:
        """Return the code, and the fields that are the reason for it."""
        return self.code.name + (f" ({', '.join(self._fields)})" if self._fields else "")

    def details(self) -> str:
        """Return what is known of the caller, the model, the tokens and the times, each after a comma."""
        details = [f"peer {self.peer}"] if self.peer else []
        details += [f"caller {self.caller:.256}"] if self.caller else []
        if self.model:
            details += [f"model {self.model}", f"{self._prompt_tokens} tokens in", f"{self._completion_tokens} out"]
        if self._queue_seconds is not None:
            details.append(f"queued {self._queue_seconds:.3f} s")
        if self._first_token_seconds is not None:
            details.append(f"first token after {self._first_token_seconds:.3f} s")
        return "".join(f", {detail}" for detail in details)


def _later(seconds: float | None, delay: float) -> float | None:
    return None if seconds is None else seconds + delay


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


_current: ContextVar[Outcome | None] = ContextVar("outcome")
_refusals = _RefusalLog()
flush = _refusals.flush


@contextmanager
def log_call(name: str) -> Iterator[Outcome]:
    """Yield the call's outcome, which is current in the block, and log it when the block ends."""
    start, outcome = time.monotonic(), Outcome()
    token = _current.set(outcome)
    try:
        yield outcome
    finally:
        _current.reset(token)
        code = outcome.code
        if code not in _REFUSALS or _refusals.is_first(name, code.name):
            seconds, details = time.monotonic() - start, outcome.details()
            logger.info("%s %.256r: %s after %.3f s%s", name, outcome.subject, outcome.describe(), seconds, details)


def current_outcome() -> Outcome:
    """Return the outcome of the current call; outside of a call, one that nobody reads."""
    return _current.get(None) or Outcome()


def log_error(error: Exception, code: grpc.StatusCode, subject: str) -> None:
    """Log the details that the status hides: the traceback of an internal error, or the cause of another."""
    if code is grpc.StatusCode.INTERNAL:
        logger.error("request %.256r failed", subject, exc_info=error)
    elif error.__cause__ and code is not grpc.StatusCode.RESOURCE_EXHAUSTED:
        logger.warning("request %.256r: %s: %r", subject, error, error.__cause__)
