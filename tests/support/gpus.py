"""Tests of what only a GPU has, of kernels that Triton's interpreter runs, too, and of engines that round."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from reference import ReferenceYuan

VLLMS_DEFAULT = {  # in place of a test's own, but for memory, which a GPU may be short of
    "enforce_eager": False,
    "dtype": "bfloat16",
    "block_size": None,
    "max_num_batched_tokens": None,
    "gpu_memory_utilization": 0.2,
}


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def kernels_in(module: str) -> Any:
    """A module of the model's with Triton kernels. Where these cannot run, the test is skipped."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    if not (torch.cuda.is_available() or triton.knobs.runtime.interpret):
        pytest.skip("no NVIDIA GPU here, and TRITON_INTERPRET is not set")
    return import_module(f"yuan_grpc.model.{module}")


def on_a_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test of what only a GPU has."""
    skipped = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
    return pytest.mark.gpu(skipped(test))  # type: ignore[no-any-return]


def rounding(reference: ReferenceYuan, prompts: list[list[int]], answers: list[dict[str, Any]]) -> float:
    """The largest difference of a token's log-probability to the formulas', whichever tokens were taken."""
    largest = []
    for prompt, answer in zip(prompts, answers, strict=True):
        logprobs = reference.logprobs(prompt + answer["token_ids"])[len(prompt) - 1 : -1]
        scored = logprobs.gather(1, torch.tensor(answer["token_ids"])[:, None])[:, 0]
        largest.append(float((scored - torch.tensor(answer["logprobs"])).abs().max()))
    print("largest differences:", *(f"{value:.1e}" for value in largest))
    return max(largest)
