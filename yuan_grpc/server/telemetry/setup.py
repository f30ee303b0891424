"""Start of the telemetry that the operator has enabled."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from threading import Thread
from typing import TYPE_CHECKING

from yuan_grpc.server.core.access_log import observe_calls
from yuan_grpc.server.settings import Settings

if TYPE_CHECKING:
    from yuan_grpc.server.telemetry.call_metrics import CallMetrics
    from yuan_grpc.server.telemetry.server_metrics import ServerMetrics

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 2
"""Limit on the time to send the last spans, in seconds."""


@contextmanager
def enable(settings: Settings, service: str) -> Iterator["ServerMetrics | None"]:
    """Measure and trace calls and serve metrics in the block, as far as enabled.

    Args:
        settings: the settings of the server.
        service: the name of the gRPC service.

    Yields:
        The metrics of the server; None if they are not enabled.

    Raises:
        OSError: the address of the metrics cannot be bound.
    """
    with ExitStack() as stack:
        if endpoint := settings.telemetry.otlp_traces_endpoint:
            stack.enter_context(_trace_calls(endpoint, service))
        port = settings.telemetry.metrics_port
        yield None if port is None else stack.enter_context(_serve_metrics(settings.host, port))


@contextmanager
def _serve_metrics(host: str, port: int) -> Iterator["ServerMetrics"]:
    from yuan_grpc.server.telemetry.metrics_server import MetricsServer

    server = MetricsServer(host, port)
    server.start()
    logger.info("metrics listening on port %d", server.port)
    try:
        with observe_calls(call_metrics()):
            yield server_metrics()
    finally:
        server.close()


@contextmanager
def _trace_calls(endpoint: str, service: str) -> Iterator[None]:
    from yuan_grpc.server.telemetry.tracing import CallTracer, create_provider

    provider = create_provider(endpoint)
    try:
        with observe_calls(CallTracer(provider.get_tracer(service), service)):
            yield
    finally:
        sending = Thread(target=provider.shutdown, name="last-spans", daemon=True)
        sending.start()
        sending.join(FLUSH_SECONDS)  # without a collector, it would retry for longer


@cache
def call_metrics() -> "CallMetrics":
    """Return the metrics of calls of this process, which can exist once."""
    from yuan_grpc.server.telemetry.call_metrics import CallMetrics

    return CallMetrics()


@cache
def server_metrics() -> "ServerMetrics":
    """Return the metrics of the server, which can exist once."""
    from yuan_grpc.server.telemetry.server_metrics import ServerMetrics

    return ServerMetrics()
