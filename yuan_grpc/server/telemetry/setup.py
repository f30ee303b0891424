"""Start of the telemetry that the operator has enabled."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import TYPE_CHECKING

from yuan_grpc.server.core.access_log import observe_calls
from yuan_grpc.server.settings import Settings

if TYPE_CHECKING:
    from yuan_grpc.server.telemetry.call_metrics import CallMetrics
    from yuan_grpc.server.telemetry.server_metrics import ServerMetrics

logger = logging.getLogger(__name__)


@contextmanager
def enable(settings: Settings) -> Iterator["ServerMetrics | None"]:
    """Measure calls and serve metrics in the block, as far as enabled.

    Yields:
        The metrics of the server; None if they are not enabled.

    Raises:
        OSError: the address of the metrics cannot be bound.
    """
    port = settings.telemetry.metrics_port
    if port is None:
        yield None
        return
    from yuan_grpc.server.telemetry.metrics_server import MetricsServer

    with ExitStack() as stack:
        server = MetricsServer(settings.host, port)
        server.start()
        stack.callback(server.close)
        stack.enter_context(observe_calls(call_metrics()))
        logger.info("metrics listening on port %d", server.port)
        yield server_metrics()


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
