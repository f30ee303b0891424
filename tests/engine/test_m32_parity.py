"""Yuan2.0-M32 on the real engine compared with the reference, in every state of the scheduler.

Each start of an engine takes seconds, so one test covers several states.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.test_parity import (
    BFLOAT16_TOLERANCE,
    DRAFTS,
    ENGINE,
    FP8_TOLERANCE,
    LENGTHS,
    TF32_TOLERANCE,
    TOKENS,
    TOLERANCE,
    alone,
    logprob_difference,
)
from engine_process import run_program
from gpus import FLOAT32_ON_GPUS, VLLM_DEFAULTS, requires_gpu
from reference import Continuation, ReferenceYuan

from yuan_grpc.model.checkpoint.random import write_checkpoint

pytestmark = pytest.mark.engine

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "attention_projection_size": 128,
    "moe_config": {"moe_num_experts": 6, "moe_top_k": 2, "ffn_hidden_size": 64},
}
UNEVEN = {"moe_num_experts": 5, "moe_top_k": 3, "ffn_hidden_size": 64, "norm_topk_prob": False}
"""Experts that two ranks cannot share equally, and whose shares do not add up to 1."""
GPU_SIZES: dict[str, Any] = SIZES | {
    "hidden_size": 512,
    "num_attention_heads": 4,
    "attention_projection_size": 1024,
    "moe_config": {"moe_num_experts": 8, "moe_top_k": 2, "ffn_hidden_size": 512},
}
"""The published sizes of a head: 256 dimensions, of which 128 are rotated."""


def write(folder: Path, demo: Path, sizes: dict[str, Any]) -> Path:
    """Write a checkpoint with random weights in float32, so that loading does not round them."""
    write_checkpoint(folder, demo, sizes, seed=7, dtype=torch.float32)
    return folder


@pytest.fixture(scope="module")
def checkpoint(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint of the M32 architecture."""
    return write(tmp_path_factory.mktemp("m32"), demo, SIZES)


@pytest.fixture(scope="module")
def prompts(tokens: int) -> list[list[int]]:
    """One random prompt of each length, and a repeated one that drafts can continue."""
    generator = random.Random(0)
    drawn = [[generator.randrange(tokens) for _ in range(length)] for length in LENGTHS]
    return [*drawn, drawn[3][:7] * 5]


@pytest.fixture(scope="module")
def expected(checkpoint: Path, tokens: int, prompts: list[list[int]]) -> list[Continuation]:
    """The reference's continuation of each prompt."""
    return continuations(checkpoint, tokens, prompts)


def continuations(checkpoint: Path, tokens: int, prompts: list[list[int]]) -> list[Continuation]:
    """Return the reference's continuation of each prompt."""
    reference = ReferenceYuan(checkpoint, tokens)
    return [reference.continue_greedily(prompt, TOKENS) for prompt in prompts]


def run(model: Path, rounds: list[list[list[int]]], out: Path, **engine: object) -> dict[str, Any]:
    """Run an engine in a separate process."""
    job = {"model": model, "engine": ENGINE | engine, "rounds": rounds, "tokens": TOKENS}
    result: dict[str, Any] = run_program("run_engine.py", job, out / "out.json")
    assert "error" not in result, result
    return result


def test_the_reference_tells_the_choices_of_the_architecture_apart(
    checkpoint: Path, tokens: int, prompts: list[list[int]]
) -> None:
    """The published fork scales by the rotated share of a head; the tolerance would show that."""
    right = ReferenceYuan(checkpoint, tokens).logprobs(prompts[4])
    for field, value in {"scale": 32**-0.5, "rotated": 64}.items():
        other = ReferenceYuan(checkpoint, tokens)
        setattr(other, field, value)
        assert (other.logprobs(prompts[4]) - right).abs().max() > 100 * TOLERANCE


def test_compiled_in_chunks_and_after_prefix_hits(
    demo: Path, tokens: int, prompts: list[list[int]], tmp_path: Path
) -> None:
    """One layer: each takes ten seconds to compile."""
    model = write(tmp_path / "model", demo, SIZES | {"num_hidden_layers": 1})
    expected = continuations(model, tokens, prompts)
    rounds = [prompts, prompts, *alone(prompts)]
    first, repeated, *one_by_one = run(model, rounds, tmp_path, enforce_eager=False)["rounds"]
    for answers in (first, repeated, [answers[0] for answers in one_by_one]):
        assert logprob_difference(answers, expected) < TOLERANCE
    assert [answer["cached"] for answer in repeated][4:] == [96, 320, 32]


def test_preempted_requests_with_drafts(
    checkpoint: Path, prompts: list[list[int]], expected: list[Continuation], tmp_path: Path
) -> None:
    few_blocks = {"num_gpu_blocks_override": 20, "speculative_config": DRAFTS}
    result = run(checkpoint, [prompts * 2], tmp_path, **few_blocks)
    assert result["preemptions"] > 0
    assert 0 < result["accepted"] < result["drafted"]
    assert logprob_difference(result["rounds"][0], expected * 2) < TOLERANCE


@pytest.mark.parametrize("expert_parallel", [False, True], ids=["tensor parallel", "expert parallel"])
def test_two_ranks(
    monkeypatch: pytest.MonkeyPatch,
    demo: Path,
    checkpoint: Path,
    tokens: int,
    prompts: list[list[int]],
    expected: list[Continuation],
    expert_parallel: bool,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # otherwise vLLM requires a NUMA node per process
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model = checkpoint
    if expert_parallel:
        model = write(tmp_path / "model", demo, SIZES | {"moe_config": UNEVEN})
        expected = continuations(model, tokens, prompts)
    options = {"tensor_parallel_size": 2, "enable_expert_parallel": expert_parallel}
    for answers in run(model, [prompts, prompts], tmp_path, **options)["rounds"]:
        assert logprob_difference(answers, expected) < TOLERANCE


def typical_difference(reference: ReferenceYuan, prompts: list[list[int]], answers: list[dict[str, Any]]) -> float:
    """Return the median difference of the log-probabilities of chosen tokens.

    Rounded scores select other experts where two are nearly equal, so single tokens differ by more.
    """
    differences = []
    for prompt, answer in zip(prompts, answers, strict=True):
        logprobs = reference.logprobs(prompt + answer["token_ids"])[len(prompt) - 1 : -1]
        chosen = logprobs.gather(1, torch.tensor(answer["token_ids"])[:, None])[:, 0]
        differences.append((chosen - torch.tensor(answer["logprobs"])).abs())
    joined = torch.cat(differences)
    print(f"differences: median {joined.median():.1e}, largest {joined.max():.1e}")
    return float(joined.median())


@requires_gpu
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("expert_parallel", [False, True], ids=["", "expert parallel"])
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        (FLOAT32_ON_GPUS, TF32_TOLERANCE),
        (VLLM_DEFAULTS, BFLOAT16_TOLERANCE),
        (VLLM_DEFAULTS | {"quantization": "fp8"}, FP8_TOLERANCE),
    ],
    ids=["float32, eager", "bfloat16, compiled", "fp8, compiled"],
)
def test_ranks_on_gpus(
    demo: Path,
    tokens: int,
    prompts: list[list[int]],
    ranks: int,
    expert_parallel: bool,
    options: dict[str, Any],
    tolerance: float,
    tmp_path: Path,
) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"fewer than {ranks} GPUs here")
    if expert_parallel and ranks == 1:
        pytest.skip("expert parallelism needs several GPUs")
    model = write(tmp_path / "model", demo, GPU_SIZES)
    parallel = {"tensor_parallel_size": ranks, "enable_expert_parallel": expert_parallel}
    rounds = run(model, [prompts, prompts], tmp_path, **options, **parallel)["rounds"]
    assert rounds[1][-2]["cached"] > 0
    reference = ReferenceYuan(model, tokens)
    for answers in rounds:
        assert typical_difference(reference, prompts, answers) < tolerance
