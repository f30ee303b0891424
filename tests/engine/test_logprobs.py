"""Log-probabilities of batched requests: the options of one request do not affect another."""

from pathlib import Path
from typing import Any

import pytest
from engine_process import run_program

pytestmark = pytest.mark.engine

TOKENS = 6
TOKEN_IDS = [300, 400, 500]
PROMPTS = [[300, 400, 500], [310, 410], [320], [330, 430, 530, 630]]
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_num_seqs": 8,
    "max_model_len": 128,
    "block_size": 32,
    "kv_cache_memory_bytes": 32 * 2**20,
    "enable_prefix_caching": False,
}

Round = list[list[list[tuple[int, float, int]]] | None]


def request(prompt: int, **options: Any) -> dict[str, Any]:
    """Return a greedy request of fixed length."""
    sampling = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "flat_logprobs": True}
    return {"prompt": PROMPTS[prompt], "sampling": sampling | options}


WITH_TOKEN_IDS = request(0, logprob_token_ids=TOKEN_IDS)
OTHERS = [request(1, logprobs=2), request(2, logprobs=0), request(3, logprobs=5), request(1)]
ROUNDS = {
    "others alone": [*OTHERS],
    "token_ids first": [WITH_TOKEN_IDS, *OTHERS],
    "token_ids last": [*OTHERS, request(0, logprobs=3, logprob_token_ids=TOKEN_IDS)],
    "two requests": [request(0, logprob_token_ids=TOKEN_IDS * 2), request(1, logprobs=2)],
    "token_ids alone": [WITH_TOKEN_IDS],
    "token_ids and no logprobs": [WITH_TOKEN_IDS, request(1)],
}


def run(model: Path, out: Path, unpatched: bool = False) -> dict[str, Round]:
    """Run the rounds in an engine in a separate process."""
    job = {"model": str(model), "engine": ENGINE, "rounds": list(ROUNDS.values()), "unpatched": unpatched}
    results = run_program("run_sampling.py", job, out)
    return {name: [result["logprobs"] for result in batch] for name, batch in zip(ROUNDS, results, strict=True)}


@pytest.fixture(scope="session")
def rounds(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Round]:
    """The log-probabilities of every request."""
    return run(demo, tmp_path_factory.mktemp("logprobs") / "out.json")


def is_close(actual: Any, expected: Any) -> bool:
    """Return whether nested lists are equal up to rounding."""
    if isinstance(actual, list):
        return len(actual) == len(expected) and all(map(is_close, actual, expected))
    return bool(actual == pytest.approx(expected, abs=1e-4))


def test_other_requests_keep_their_most_likely_tokens(rounds: dict[str, Round]) -> None:
    assert is_close(rounds["token_ids first"][1:], rounds["others alone"])
    assert is_close(rounds["token_ids last"][:-1], rounds["others alone"])
    assert is_close(rounds["two requests"][1], rounds["others alone"][0])
    assert [logprobs and len(logprobs[0]) for logprobs in rounds["others alone"]] == [3, 1, 6, None]


@pytest.mark.parametrize(
    ("name", "index"), [("token_ids first", 0), ("token_ids last", -1), ("token_ids and no logprobs", 0)]
)
def test_requested_tokens_are_the_same_in_a_batch(rounds: dict[str, Round], name: str, index: int) -> None:
    (expected,) = rounds["token_ids alone"]
    assert is_close(rounds[name][index], expected)
    assert expected is not None
    assert [[token for token, _, _ in position[1:]] for position in expected] == [TOKEN_IDS] * TOKENS


def test_a_greedy_token_always_has_rank_one(rounds: dict[str, Round]) -> None:
    positions = [position for batch in rounds.values() for logprobs in batch if logprobs for position in logprobs]
    assert {position[0][2] for position in positions} == {1}


def test_vllm_still_needs_the_patch(demo: Path, tmp_path: Path) -> None:
    rounds = run(demo, tmp_path / "out.json", unpatched=True)
    assert not is_close(rounds["token_ids first"][1:], rounds["others alone"])
