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
PACKED = ("qweight", "weight_packed")
"""Names of weights of four bits."""


def report_progress(
    weights: Iterable[tuple[str, torch.Tensor]], config: YuanConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights, and log the share that has been loaded every few seconds."""
    sizes = {name: math.prod(shape) for name, shape in published_shapes(config).items()}
    total, loaded = sum(sizes.values()), 0
    reported = time.monotonic()
    for name, weight in weights:
        yield name, weight
        module, _, kind = name.rpartition(".")
        loaded += sizes.get(f"{module}.weight" if kind in PACKED else name, 0)
        if time.monotonic() - reported >= INTERVAL_SECONDS:
            reported = time.monotonic()
            logger.info("loading weights: %d %%", 100 * loaded // total)
