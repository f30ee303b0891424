"""The metrics of the server itself: its version, readiness and stalls."""

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge


class ServerMetrics:
    """The metrics of the process that runs the engine.

    Args:
        registry: the registry to add the metrics to.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._info = Gauge(
            "yuan_grpc_info", "1, with the versions.", ("version", "model"), multiprocess_mode="max", registry=registry
        )
        self.ready = Gauge(
            "yuan_grpc_ready", "1 while health is SERVING, else 0.", multiprocess_mode="livemin", registry=registry
        )
        self.start_seconds = Gauge(
            "yuan_grpc_start_seconds",
            "Time from the start of the process to readiness; 0 before it.",
            multiprocess_mode="max",
            registry=registry,
        )
        self.stalls = Counter("yuan_grpc_engine_stalls", "Times that the engine stalled.", registry=registry)

    def describe(self, version: str, model: str) -> None:
        """Set the version of the server and the name of the model."""
        self._info.labels(version, model).set(1)
