"""The metrics of calls, in addition to vLLM's of the engine.

They can be merged over processes: with `PROMETHEUS_MULTIPROC_DIR` set, each process writes its own to that folder.
"""

import grpc
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from yuan_grpc.server.core.access_log import Outcome
from yuan_grpc.server.core.request_stats import GAP_BOUNDS, RequestStats
from yuan_grpc.server.counted_histogram import CountedHistogram

MAX_CALLERS = 100
"""Maximum number of callers with a label of their own, in one process."""
OTHER_CALLERS = "other"

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Upper bounds of the buckets for times of a call, in seconds."""


class CallMetrics:
    """An observer of calls that counts them.

    Args:
        registry: the registry to add the metrics to.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._callers: set[str] = set()
        self._calls = Counter(
            "yuan_grpc_calls",
            "Finished calls, and requests of batches.",
            ("method", "code", "caller"),
            registry=registry,
        )
        self._in_flight = Gauge(
            "yuan_grpc_calls_in_flight", "Running calls.", ("method",), multiprocess_mode="livesum", registry=registry
        )
        self._call_seconds = Histogram(
            "yuan_grpc_call_seconds", "Duration of calls.", ("method",), buckets=SECONDS, registry=registry
        )
        self._errors = Counter(
            "yuan_grpc_errors",
            "Calls that ended with an error, by ErrorReason.",
            ("method", "reason"),
            registry=registry,
        )
        self._cancellations = Counter(
            "yuan_grpc_cancellations",
            "Calls that were cancelled: client, deadline or abort.",
            ("method", "cause"),
            registry=registry,
        )
        self._prompt_tokens = Counter(
            "yuan_grpc_prompt_tokens", "Tokens of accepted prompts.", ("model", "caller"), registry=registry
        )
        self._completion_tokens = Counter(
            "yuan_grpc_completion_tokens", "Generated tokens.", ("model", "caller"), registry=registry
        )
        self._queue_seconds = Histogram(
            "yuan_grpc_queue_seconds", "Time that requests waited for the engine.", buckets=SECONDS, registry=registry
        )
        self._prefill_seconds = Histogram(
            "yuan_grpc_prefill_seconds",
            "Time from the end of the wait to the first token.",
            buckets=SECONDS,
            registry=registry,
        )
        self._first_token_seconds = Histogram(
            "yuan_grpc_time_to_first_token_seconds",
            "Time from the arrival of a request to its first token.",
            buckets=SECONDS,
            registry=registry,
        )
        self._gap_seconds = CountedHistogram(
            "yuan_grpc_inter_token_seconds",
            "Time between two messages with tokens of a stream.",
            buckets=GAP_BOUNDS,
            registry=registry,
        )
        self._messages = Counter("yuan_grpc_stream_messages", "Messages with tokens in streams.", registry=registry)
        self._coalesced = Counter(
            "yuan_grpc_coalesced_messages",
            "Messages in streams with several tokens of a choice, as for slow readers.",
            registry=registry,
        )

    def begin(self, outcome: Outcome) -> None:
        """Count a running call."""
        self._in_flight.labels(outcome.method).inc()

    def end(self, outcome: Outcome, seconds: float) -> None:
        """Count a finished call and its requests."""
        method, caller = outcome.method, self._bounded(outcome.caller)
        self._in_flight.labels(method).dec()
        self._calls.labels(method, outcome.code.name, caller).inc()
        self._call_seconds.labels(method).observe(seconds)
        if cause := _cancellation(outcome):
            self._cancellations.labels(method, cause).inc()
        elif outcome.reason:
            self._errors.labels(method, outcome.reason).inc()
        for stats in outcome.requests:
            self._count(stats, caller)

    def _count(self, stats: RequestStats, caller: str) -> None:
        self._prompt_tokens.labels(stats.model, caller).inc(stats.prompt_tokens)
        self._completion_tokens.labels(stats.model, caller).inc(stats.completion_tokens)
        if stats.queue_seconds is not None:
            self._queue_seconds.observe(stats.queue_seconds)
        if stats.prefill_seconds is not None:
            self._prefill_seconds.observe(stats.prefill_seconds)
        if stats.first_token_seconds is not None:
            self._first_token_seconds.observe(stats.first_token_seconds)
        if stats.messages:
            self._messages.inc(stats.messages)
            self._coalesced.inc(stats.coalesced)
            self._gap_seconds.add(stats.gaps, stats.gap_seconds)

    def _bounded(self, caller: str) -> str:
        """Return the label of a caller. Names may come from certificates, so their number is limited."""
        if caller in self._callers or not caller:
            return caller
        if len(self._callers) >= MAX_CALLERS:
            return OTHER_CALLERS
        self._callers.add(caller)
        return caller


def _cancellation(outcome: Outcome) -> str:
    """Return the cause of a cancellation; an empty text if the call was not cancelled."""
    if outcome.code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return "deadline"
    if outcome.code is grpc.StatusCode.CANCELLED:
        return "abort" if outcome.reason else "client"
    return ""
