"""A vLLM stat logger that keeps the load of each rank."""

import time
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from yuan_grpc.server.engine.load import EngineLoad, LoadBoard

RATE_SECONDS = 2.0
"""Shortest time over which tokens per second are measured, in seconds."""


class LoadLogger(StatLoggerBase):
    """Posts the load of a rank after each of its steps.

    Args:
        board: where to post it.
    """

    def __init__(self, board: LoadBoard, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        self._board = board
        self._config = vllm_config
        self._rank = engine_index
        self._rate = TokenRate(time.monotonic())
        self._post(SchedulerStats(), 0.0)

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Post the load after a step."""
        tokens = iteration_stats.num_generation_tokens if iteration_stats else 0
        rate = self._rate.add(tokens, time.monotonic())
        if scheduler_stats is not None:
            is_idle = not (scheduler_stats.num_running_reqs or scheduler_stats.num_waiting_reqs)
            self._post(scheduler_stats, 0.0 if is_idle else rate)

    def _post(self, stats: SchedulerStats, rate: float) -> None:
        cache = self._config.cache_config
        self._board.post(
            EngineLoad(
                rank=self._rank,
                num_running=stats.num_running_reqs,
                num_waiting=stats.num_waiting_reqs + stats.num_skipped_waiting_reqs,
                max_num_seqs=self._config.scheduler_config.max_num_seqs,
                kv_cache_usage=stats.kv_cache_usage,
                kv_cache_tokens=(cache.num_gpu_blocks or 0) * (cache.block_size or 0),
                tokens_per_second=rate,
            )
        )

    def log_engine_initialized(self) -> None:
        """Do nothing: the load was posted at the beginning."""


class TokenRate:
    """Tokens per second, over the last `RATE_SECONDS` or a little more.

    Args:
        now: the time, in seconds.
    """

    def __init__(self, now: float) -> None:
        self._since = now
        self._tokens = 0
        self._rate = 0.0

    def add(self, tokens: int, now: float) -> float:
        """Add tokens, and return the rate of the last complete period; in the first one, the rate so far."""
        self._tokens += tokens
        elapsed = now - self._since
        if elapsed >= RATE_SECONDS:
            self._rate, self._since, self._tokens = self._tokens / elapsed, now, 0
        elif not self._rate and elapsed > 0:
            return self._tokens / elapsed
        return self._rate
