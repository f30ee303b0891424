"""Drafts of requests that draw their tokens: on CPUs vLLM gives them neither temperature nor `top_k` nor `top_p`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import result_of

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]  # of vLLM's own, while it is imported

PROMPTS = [[300, 400, 500] * 6, [310, 410] * 8, [320]]
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_num_seqs": 8,
    "max_model_len": 256,
    "block_size": 32,
    "kv_cache_memory_bytes": 32 * 2**20,
    "speculative_config": {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 3,
    },
}
ONLY_THE_LIKELIEST: list[dict[str, Any]] = [
    {"top_k": 1},
    {"top_k": 1, "temperature": 0.3},
    {"top_p": 1e-6},
    {"top_p": 1e-6, "top_k": 50, "temperature": 2},
]


def test_what_leaves_one_choice_gives_the_greedy_tokens(demo: Path, tmp_path: Path) -> None:
    def ask(**sampling: Any) -> list[dict[str, Any]]:
        asked = {"temperature": 1, "max_tokens": 24, "ignore_eos": True, "flat_logprobs": True} | sampling
        return [{"prompt": prompt, "sampling": asked} for prompt in PROMPTS]

    each = [ask(**sampling) for sampling in ONLY_THE_LIKELIEST]
    together = [request for requests in each for request in requests]
    rounds = [ask(temperature=0), *each, together, ask(seed=1), ask(seed=1)]
    result = result_of("run_sampling.py", {"model": demo, "engine": ENGINE, "rounds": rounds}, tmp_path / "out.json")
    greedy, *others = [[answer["token_ids"] for answer in answers] for answers in result]
    *likeliest, company, drawn, drawn_again = others
    assert likeliest == [greedy] * len(ONLY_THE_LIKELIEST)
    assert company == greedy * len(ONLY_THE_LIKELIEST)
    assert drawn == drawn_again != greedy


@pytest.fixture
def expand() -> Any:
    """vLLM's stand-in for a kernel, mended."""
    if torch.cuda.is_available():
        pytest.skip("GPUs have the kernel")
    from vllm.platforms import current_platform
    from vllm.utils import cpu_triton_utils

    from yuan_grpc.model.patches import cpu_spec_decode

    current_platform.import_kernels()
    cpu_spec_decode.mend()
    return getattr(cpu_triton_utils, cpu_spec_decode.EXPAND)


@pytest.mark.parametrize("values", [[0.7, 0.0, 1.3], [20, 0, 7]], ids=["floats", "whole numbers"])
def test_each_draft_has_its_requests_value(expand: Any, values: list[float]) -> None:
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    output = torch.full((5,), 99, dtype=torch.tensor(values).dtype)
    expand(output, torch.tensor(values), ends, 0, 1)
    assert output.tolist() == torch.tensor([values[0]] * 2 + [values[2]] * 3).tolist()
    expand(output, torch.tensor(values), ends + torch.tensor([-2, 0, 0]), 0, 1)
    assert output.tolist() == torch.tensor([1] * 2 + [values[2]] * 3).tolist()


def test_vllm_itself_still_needs_the_mend(expand: Any) -> None:
    output = torch.full((2,), 99.0)
    expand.__wrapped__(output, torch.tensor([0.7]), torch.tensor([2], dtype=torch.int32), 0, 1)
    assert output.tolist() == [99, 99]
