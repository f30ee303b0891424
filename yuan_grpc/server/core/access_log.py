"""The access log: one line for each call, or one for many refused calls. Observers are notified of the same calls."""

import asyncio
import logging
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import grpc

from yuan_grpc.server.core.request_stats import RequestStats
from yuan_grpc.server.errors import InvalidRequestError, reason_name
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
"""Statuses of calls that are refused in large numbers, which are summarized in one line."""

TRACE_HEADERS = ("traceparent", "tracestate")
"""Headers of the W3C trace context, which the spans of a call continue."""
_TRACE_PARENT = re.compile("[0-9a-f]{2}-([0-9a-f]{32})-")
_NO_HEADERS: Mapping[str, str] = {}


class Outcome:
    """The outcome of a call, set while it runs.

    Attributes:
        method: the name of the method or route.
        subject: the request id or adapter name.
        code: the status code.
        reason: the name of the `ErrorReason`; empty without an error.
        peer: the address of the caller.
        caller: the name of the caller's token or certificate; empty if it is anonymous.
        requests: the requests of the call that were accepted; an HTTP call may have several.
        trace_headers: those of `TRACE_HEADERS` with the span that the engine's spans continue: the caller's, or that of
            the call.

    Args:
        parent: the outcome of the call that contains this one.
    """

    def __init__(
        self, method: str = "", trace_headers: Mapping[str, str] = _NO_HEADERS, parent: "Outcome | None" = None
    ) -> None:
        self.method = method
        self.trace_headers: Mapping[str, str] = trace_headers or (parent.trace_headers if parent else trace_headers)
        self.subject = ""
        self.code = grpc.StatusCode.CANCELLED
        self.reason = ""
        self.peer: str = parent.peer if parent else ""
        self.caller = current_identity().name
        self.requests: list[RequestStats] = []
        self._fields: list[str] = []

    def set_error(self, error: Exception, code: grpc.StatusCode) -> None:
        """Set the code and the reason of an error, and the fields that it names."""
        self.code, self.reason = code, reason_name(error)
        if isinstance(error, InvalidRequestError):
            self._fields = [violation.field for violation in error.violations if violation.field]

    def begin(self, stats: RequestStats, model: str, prompt_tokens: int) -> None:
        """Add a request whose prompt has been accepted."""
        stats.model, stats.prompt_tokens = model, prompt_tokens
        self.requests.append(stats)

    def describe(self) -> str:
        """Return the code, and the fields that caused it."""
        return self.code.name + (f" ({', '.join(self._fields)})" if self._fields else "")

    def details(self) -> str:
        """Return the known values of caller, model, tokens and times, each preceded by a comma."""
        details = [f"peer {self.peer}"] if self.peer else []
        if self.caller:
            details.append(f"caller {self.caller:.256}")
        if self.requests:
            first, tokens = self.requests[0], sum(stats.completion_tokens for stats in self.requests)
            prompt_tokens = sum(stats.prompt_tokens for stats in self.requests)
            details += [f"model {first.model}", f"{prompt_tokens} tokens in", f"{tokens} out"]
            if first.queue_seconds is not None:
                details.append(f"queued {first.queue_seconds:.3f} s")
            if first.first_token_seconds is not None:
                details.append(f"first token after {first.first_token_seconds:.3f} s")
        return "".join(f", {detail}" for detail in details)

    def log_fields(self) -> dict[str, Any]:
        """Return the fields of the JSON log. Unknown ones are left out, and prompts are never among them."""
        fields: dict[str, Any] = {"method": self.method, "status": self.code.name, "id": self.subject[:256]}
        fields |= {"trace_id": self._trace_id, "reason": self.reason, "fields": self._fields}
        fields |= {"peer": self.peer, "caller": self.caller[:256]}
        if self.requests:
            first = self.requests[0]
            fields |= {
                "model": first.model,
                "prompt_tokens": sum(stats.prompt_tokens for stats in self.requests),
                "completion_tokens": sum(stats.completion_tokens for stats in self.requests),
                "queue_seconds": _rounded(first.queue_seconds),
                "prefill_seconds": _rounded(first.prefill_seconds),
                "first_token_seconds": _rounded(first.first_token_seconds),
            }
        return {name: value for name, value in fields.items() if value not in ("", None, [])}

    @property
    def _trace_id(self) -> str:
        match = _TRACE_PARENT.match(self.trace_headers.get("traceparent", ""))
        return match[1] if match else ""


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


class CallObserver(Protocol):
    """An observer of all calls, such as metrics and traces."""

    def begin(self, outcome: Outcome) -> None:
        """Observe the start of a call, with its method and trace headers."""

    def end(self, outcome: Outcome, seconds: float) -> None:
        """Observe the end of a call and its duration."""


class _RefusalLog:
    """Counts refused calls after the first one, and logs the counts once a second."""

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
            fields = {"method": name, "status": code, "count": count}
            logger.info("%s: %s for %d more calls", name, code, count, extra={"fields": fields})
        self._counts.clear()


_current: ContextVar[Outcome | None] = ContextVar("outcome")
_refusals = _RefusalLog()
_observers: list[CallObserver] = []
flush = _refusals.flush


@contextmanager
def observe_calls(observer: CallObserver) -> Iterator[None]:
    """Let an observer see the calls that begin in the block."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


@contextmanager
def log_call(name: str, trace_headers: Mapping[str, str] = _NO_HEADERS, method: str = "") -> Iterator[Outcome]:
    """Yield the call's outcome, which is current in the block, and log it when the block ends.

    Args:
        name: the name in the log.
        trace_headers: those of `TRACE_HEADERS` that the caller sent.
        method: the name for observers, if it differs.
    """
    start, observers = time.monotonic(), [*_observers]
    outcome = Outcome(method or name, trace_headers, parent=_current.get(None))
    token = _current.set(outcome)
    for observer in observers:
        observer.begin(outcome)
    try:
        yield outcome
    finally:
        _current.reset(token)
        seconds = time.monotonic() - start
        for observer in observers:
            observer.end(outcome, seconds)
        _log(name, outcome, seconds)


def _log(name: str, outcome: Outcome, seconds: float) -> None:
    if outcome.code in _REFUSALS and not _refusals.is_first(name, outcome.code.name):
        return
    if logger.isEnabledFor(logging.INFO):
        fields = outcome.log_fields() | {"message": f"{name}: {outcome.code.name}", "total_seconds": _rounded(seconds)}
        values = (name, outcome.subject, outcome.describe(), seconds, outcome.details())
        logger.info("%s %.256r: %s after %.3f s%s", *values, extra={"fields": fields})


def current_outcome() -> Outcome:
    """Return the outcome of the current call; outside of a call, one that nobody reads."""
    return _current.get(None) or Outcome()


def log_error(error: Exception, code: grpc.StatusCode, subject: str) -> None:
    """Log the details that the status hides: the traceback of an internal error, or the cause of another."""
    fields = {"id": subject[:256], "status": code.name}
    if code is grpc.StatusCode.INTERNAL:
        logger.error("request %.256r failed", subject, exc_info=error, extra={"fields": fields})
    elif error.__cause__ and code is not grpc.StatusCode.RESOURCE_EXHAUSTED:
        logger.warning("request %.256r: %s: %r", subject, error, error.__cause__, extra={"fields": fields})
