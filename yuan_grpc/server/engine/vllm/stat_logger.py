"""vLLM's Prometheus metrics, at less cost for each token."""

from typing import Any

from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from yuan_grpc.server.counted_histogram import CountedHistogram


class StatLogger(PrometheusStatLogger):
    """Records the inter-token latencies of a step together; vLLM's class records each by itself."""

    _histogram_cls = CountedHistogram

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Record the statistics of a step."""
        latencies: list[float] = []
        if iteration_stats:
            latencies, iteration_stats.inter_token_latencies_iter = iteration_stats.inter_token_latencies_iter, []
        super().record(scheduler_stats, iteration_stats, mm_cache_stats, engine_idx)
        if latencies:
            self.histogram_inter_token_latency[engine_idx].observe_all(latencies)
