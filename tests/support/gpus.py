"""Fixtures and checks for tests that need a GPU, run Triton kernels or compare rounded results."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from reference import ReferenceYuan

VLLM_DEFAULTS = {  # overrides a test's own settings, except for the memory limit
    "enforce_eager": False,
    "dtype": "bfloat16",
    "block_size": None,
    "max_num_batched_tokens": None,
    "gpu_memory_utilization": 0.2,
}
FLOAT32_ON_GPUS = {"attention_backend": "TRITON_ATTN", "gpu_memory_utilization": 0.2}
"""Settings for float32, which FlashAttention 3 does not have."""

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def import_kernels(module: str) -> Any:
    """Return a module of `yuan_grpc.model` with Triton kernels; skip the test where they cannot run."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    if not (torch.cuda.is_available() or triton.knobs.runtime.interpret):
        pytest.skip("no NVIDIA GPU here, and TRITON_INTERPRET is not set")
    return import_module(f"yuan_grpc.model.{module}")


def requires_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that needs a GPU."""
    skipped = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
    return pytest.mark.gpu(skipped(test))  # type: ignore[no-any-return]


def largest_difference(reference: ReferenceYuan, prompts: list[list[int]], answers: list[dict[str, Any]]) -> float:
    """Return the largest difference between log-probabilities of the chosen tokens and those of the reference."""
    largest = []
    for prompt, answer in zip(prompts, answers, strict=True):
        logprobs = reference.logprobs(prompt + answer["token_ids"])[len(prompt) - 1 : -1]
        chosen = logprobs.gather(1, torch.tensor(answer["token_ids"])[:, None])[:, 0]
        largest.append(float((chosen - torch.tensor(answer["logprobs"])).abs().max()))
    print("largest differences:", *(f"{value:.1e}" for value in largest))
    return max(largest)
