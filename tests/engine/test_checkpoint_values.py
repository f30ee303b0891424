"""Values of a checkpoint that ordinary random weights do not show: the epsilons of norms, and a head that differs."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.test_parity import ENGINE, SIZES, TOKENS, TOLERANCE, logprob_difference
from engine_process import run_program
from reference import ReferenceYuan
from safetensors.torch import load_file, save_file

from yuan_grpc.model.checkpoint.random import write_checkpoint

pytestmark = pytest.mark.engine


@pytest.fixture
def prompts(tokens: int) -> list[list[int]]:
    """Three random prompts."""
    generator = random.Random(3)
    return [[generator.randrange(tokens) for _ in range(length)] for length in (2, 17, 60)]


def assert_matches(reference: ReferenceYuan, model: Path, prompts: list[list[int]], out: Path) -> None:
    """Check that the engine continues the prompts as the reference does."""
    job: dict[str, Any] = {"model": model, "engine": ENGINE, "rounds": [prompts], "tokens": TOKENS}
    expected = [reference.continue_greedily(prompt, TOKENS) for prompt in prompts]
    assert logprob_difference(run_program("run_engine.py", job, out)["rounds"][0], expected) < TOLERANCE


def shrink_filters(weights: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """Scale the inputs of filters down, and the values, which have the same input, up again.

    The mean square that `output_layernorm` divides by is then close to its epsilon.
    """
    scales = {
        "input_layernorm.weight": scale,
        "conv1.bias": scale,
        "conv2.bias": scale,
        "v_proj.weight": 1 / scale,
    }
    return {
        name: weight * next((factor for end, factor in scales.items() if name.endswith(end)), 1.0)
        for name, weight in weights.items()
    }


def test_norms_add_the_epsilon_of_the_configuration_and_filters_their_own(
    demo: Path, tokens: int, prompts: list[list[int]], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    write_checkpoint(model, demo, SIZES | {"rms_norm_eps": 0.3}, seed=7, dtype=torch.float32)
    file = model / "model.safetensors"
    save_file(shrink_filters(load_file(file), 1e-3), file)
    reference, other = ReferenceYuan(model, tokens), ReferenceYuan(model, tokens)
    other.config["rms_norm_eps"] = 1e-6
    assert (reference.logprobs(prompts[1]) - other.logprobs(prompts[1])).abs().max() > 100 * TOLERANCE
    assert_matches(reference, model, prompts, tmp_path / "out.json")


def test_a_stored_head_in_a_bin_file_overrides_a_tied_embedding(
    demo: Path, tokens: int, prompts: list[list[int]], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    write_checkpoint(model, demo, SIZES, seed=7, dtype=torch.float32, file_format="bin")
    (file,) = model.glob("*.bin")
    stored = torch.load(file)
    stored["lm_head.weight"] = stored["lm_head.weight"].flip(1).contiguous()
    torch.save(stored, file)
    reference = ReferenceYuan(model, tokens)
    reference.weights = stored
    assert_matches(reference, model, prompts, tmp_path / "out.json")
