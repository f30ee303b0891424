"""An adapter whose modules have different ranks and scales: `rank_pattern` and `alpha_pattern` of PEFT."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import PREFIX, write_adapter
from engine.test_lora import ENGINE, MODULES, SIZES, TOKENS, TOLERANCE, difference
from engine_process import run_program
from reference import ReferenceYuan
from safetensors.torch import save_file

from yuan_grpc.model.checkpoint.random import write_checkpoint

pytestmark = pytest.mark.engine

RANKS = {"q_proj": 8, "k_proj": 3, "v_proj": 1, "conv1": 5, "conv2": 2, "up_proj": 6, "gate_proj": 7}
"""Joined modules have different ranks, the smaller one before and after the larger one; others have rank 4."""
ALPHAS = {"k_proj": 9, "conv1": 20}


def write_mixed_adapter(folder: Path, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Write the adapter, and return the weights with it merged in."""
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 6, "rank_pattern": RANKS, "alpha_pattern": ALPHAS}
    tensors = write_adapter(folder, weights, MODULES, seed=5, **fields)
    merged = dict(weights)
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        kind = module.rpartition(".")[2]
        rank, alpha = RANKS.get(kind, 4), ALPHAS.get(kind, 6)
        b_name = name.replace("lora_A", "lora_B")
        a = tensors[name] = tensors[name][:rank].contiguous()
        b = tensors[b_name] = tensors[b_name][:, :rank].contiguous()
        weight = merged[f"{module}.weight"]
        merged[f"{module}.weight"] = weight + (b.flatten(1) @ a.flatten(1) * alpha / rank).view_as(weight)
    save_file(tensors, folder / "adapter_model.safetensors")
    return merged


def test_modules_of_an_adapter_may_have_different_ranks(demo: Path, tokens: int, tmp_path: Path) -> None:
    model, adapter = tmp_path / "model", tmp_path / "mixed"
    write_checkpoint(model, demo, SIZES, seed=7, dtype=torch.float32)
    generator = random.Random(0)
    prompt = [generator.randrange(tokens) for _ in range(70)]
    reference = ReferenceYuan(model, tokens)
    without = reference.logprobs(prompt)[-1]
    reference.weights = write_mixed_adapter(adapter, reference.weights)
    assert (reference.logprobs(prompt)[-1] - without).abs().max() > 100 * TOLERANCE
    job: dict[str, Any] = {"model": model, "engine": ENGINE, "rounds": [[prompt]], "tokens": TOKENS}
    result = run_program("run_engine.py", job | {"adapters": [adapter], "load": [adapter]}, tmp_path / "out.json")
    assert result["errors"] == [None]
    assert difference(result["rounds"][0][0], reference.continue_greedily(prompt, TOKENS)) < TOLERANCE
