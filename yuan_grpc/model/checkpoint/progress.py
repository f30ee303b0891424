"""Progress of loading a checkpoint, for the log."""

import math
import time
from collections.abc import Iterable, Iterator

import torch
from vllm.logger import init_logger

from yuan_grpc.model.checkpoint.layout import published_shapes
from yuan_grpc.model.config import YuanConfig

logger = init_logger("vllm.yuan_grpc.model")

INTERVAL_SECONDS = 5


def report_progress(
    weights: Iterable[tuple[str, torch.Tensor]], config: YuanConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights, and log the share that has been loaded every few seconds."""
    total, loaded = sum(map(math.prod, published_shapes(config).values())), 0
    reported = time.monotonic()
    for name, weight in weights:
        yield name, weight
        loaded += weight.numel()
        if time.monotonic() - reported >= INTERVAL_SECONDS:
            reported = time.monotonic()
            logger.info("loading weights: %d %%", 100 * loaded // total)
