"""Speculative decoding with sampling, which vLLM needs a patch for on CPUs (see test_patches.py)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_process import run_program

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]  # vLLM's warnings while it is imported

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
GREEDY_IN_EFFECT: list[dict[str, Any]] = [
    {"top_k": 1},
    {"top_k": 1, "temperature": 0.3},
    {"top_p": 1e-6},
    {"top_p": 1e-6, "top_k": 50, "temperature": 2},
]


def test_sampling_with_one_candidate_returns_the_greedy_tokens(demo: Path, tmp_path: Path) -> None:
    def requests(**sampling: Any) -> list[dict[str, Any]]:
        parameters = {"temperature": 1, "max_tokens": 24, "ignore_eos": True, "flat_logprobs": True} | sampling
        return [{"prompt": prompt, "sampling": parameters} for prompt in PROMPTS]

    separate = [requests(**sampling) for sampling in GREEDY_IN_EFFECT]
    together = [request for batch in separate for request in batch]
    rounds = [requests(temperature=0), *separate, together, requests(seed=1), requests(seed=1)]
    result = run_program("run_sampling.py", {"model": demo, "engine": ENGINE, "rounds": rounds}, tmp_path / "out.json")
    greedy, *others = [[response["token_ids"] for response in responses] for responses in result]
    *in_separate_rounds, in_one_round, sampled, sampled_again = others
    assert in_separate_rounds == [greedy] * len(GREEDY_IN_EFFECT)
    assert in_one_round == greedy * len(GREEDY_IN_EFFECT)
    assert sampled == sampled_again != greedy


PARAMETERS: dict[str, dict[str, Any]] = {
    "penalties": {"presence_penalty": 1.5, "frequency_penalty": 0.7, "repetition_penalty": 1.4},
    "minimum": {"min_tokens": 12, "ignore_eos": False, "stop_token_ids": [*range(700)]},
    "allowed tokens": {"allowed_token_ids": [300, 400, 500, 310, 410, 320, 330]},
    "bad words": {"bad_words": ["中国", "的", "是"]},
    "stop strings": {"stop": ["中", "的", "e"]},
    "repetition": {"repetition_detection": {"max_pattern_size": 3, "min_pattern_size": 1, "min_count": 2}},
    "log-probabilities": {"logprobs": 3},
}


def test_greedy_requests_get_the_same_result_with_and_without_drafts(demo: Path, tmp_path: Path) -> None:
    """Apart from the parameters that are refused with drafts, vLLM applies every one of them to drafts too."""
    greedy = {"temperature": 0, "max_tokens": 24, "ignore_eos": True, "flat_logprobs": True}
    requests = [
        {"prompt": prompt, "sampling": greedy | parameters} for parameters in PARAMETERS.values() for prompt in PROMPTS
    ]
    requests += [
        {"prompt": PROMPTS[0], "sampling": greedy | {"ignore_eos": False}, "constraint": {"regex": "(ab|c){9}"}}
    ]
    plain = {name: value for name, value in ENGINE.items() if name != "speculative_config"}
    (drafted,), (expected,) = (
        run_program(
            "run_sampling.py", {"model": demo, "engine": engine, "rounds": [requests]}, tmp_path / f"{name}.json"
        )
        for name, engine in (("drafted", ENGINE), ("plain", plain))
    )
    for found, result in zip(drafted, expected, strict=True):
        positions, expected_positions = found.pop("logprobs") or [], result.pop("logprobs") or []
        assert found == result
        for position, expected_position in zip(positions, expected_positions, strict=True):
            assert [(token, rank) for token, _, rank in position] == [
                (token, rank) for token, _, rank in expected_position
            ]
            assert [value for _, value, _ in position] == pytest.approx([value for _, value, _ in expected_position])


@pytest.mark.parametrize(
    ("field", "value", "is_refused"),
    [
        ("min_p", 1e-7, True),
        ("min_p", 0.0, False),
        ("logit_bias", {5: 0.0}, True),
        ("logprob_token_ids", [7, 8, 9], True),
        ("logprobs", 3, False),
    ],
)
def test_parameters_that_do_not_apply_to_drafts_are_refused_by_name(field: str, value: Any, is_refused: bool) -> None:
    from yuan_grpc.server.engine.types import Sampling
    from yuan_grpc.server.engine.vllm.convert import check_drafts, to_sampling_params
    from yuan_grpc.server.errors import NotEnabledError

    params = to_sampling_params(Sampling(**{field: value}), stream=False)
    if not is_refused:
        check_drafts(params)
        return
    with pytest.raises(
        NotEnabledError, match=f"`{field}` needs a server that was started without --speculative-config"
    ):
        check_drafts(params)


@pytest.fixture
def expand() -> Any:
    """vLLM's CPU replacement of a Triton kernel, patched."""
    if torch.cuda.is_available():
        pytest.skip("GPUs run the Triton kernel")
    from vllm.platforms import current_platform
    from vllm.utils import cpu_triton_utils

    from yuan_grpc.model.patches import cpu_spec_decode

    current_platform.import_kernels()
    cpu_spec_decode.apply()
    return getattr(cpu_triton_utils, cpu_spec_decode.EXPAND_KERNEL)


@pytest.mark.parametrize("values", [[0.7, 0.0, 1.3], [20, 0, 7]], ids=["floats", "integers"])
def test_each_draft_token_gets_the_value_of_its_request(expand: Any, values: list[float]) -> None:
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    output = torch.full((5,), 99, dtype=torch.tensor(values).dtype)
    expand(output, torch.tensor(values), ends, 0, 1)
    assert output.tolist() == torch.tensor([values[0]] * 2 + [values[2]] * 3).tolist()
    expand(output, torch.tensor(values), ends + torch.tensor([-2, 0, 0]), 0, 1)
    assert output.tolist() == torch.tensor([1] * 2 + [values[2]] * 3).tolist()
