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
def enable(settings: Settings, service: str, *, serves_port: bool = True) -> Iterator["ServerMetrics | None"]:
    """Measure and trace calls and serve metrics in the block, as far as enabled.

    Args:
        settings: the settings of the server.
        service: the name of the gRPC service.
        serves_port: whether to serve the metrics; otherwise, another process does.

    Yields:
        The metrics of the server; None if they are not enabled.

    Raises:
        OSError: the address of the metrics cannot be bound.
    """
    with ExitStack() as stack:
        if endpoint := settings.telemetry.otlp_traces_endpoint:
            stack.enter_context(_trace_calls(endpoint, service))
        port = settings.telemetry.metrics_port
        if port is None:
            yield None
            return
        if serves_port:
            stack.enter_context(serve_metrics(settings.host, port))
        stack.enter_context(observe_calls(call_metrics()))
        yield server_metrics()


@contextmanager
def serve_metrics(host: str, port: int) -> Iterator[None]:
    """Serve the metrics of all processes of the server in the block.

    Raises:
        OSError: the address cannot be bound.
    """
    from yuan_grpc.server.telemetry.metrics_server import MetricsServer

    server = MetricsServer(host, port)
    server.start()
    logger.info("metrics listening on port %d", server.port)
    try:
        yield
    finally:
        server.close()


def forget_process(pid: int | None) -> None:
    """Leave the gauges of a process that has ended out of the metrics of several processes."""
    from prometheus_client import multiprocess

    multiprocess.mark_process_dead(pid)  # type: ignore[no-untyped-call]


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
