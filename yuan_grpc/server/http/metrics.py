"""The metrics that the HTTP port exposes."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.registry import Collector

from yuan_grpc.server.telemetry.metrics_server import source_registry

_PREFIXES = ("vllm:", "process_", "python_gc_")


class _PublicMetrics(Collector):
    """The metrics of the server without those that describe the machine or its configuration.

    The labels of a metric that ends in `_info` are versions, the engine's configuration, or the adapters in use.
    """

    def collect(self) -> Iterator[Metric]:
        for metric in source_registry().collect():
            if metric.name.startswith(_PREFIXES) and not metric.name.endswith("_info"):
                yield metric


_PUBLIC = CollectorRegistry()
_PUBLIC.register(_PublicMetrics())


def public_metrics() -> bytes:
    """Return the metrics in Prometheus' text format."""
    return generate_latest(_PUBLIC)
