"""Log-probabilities of requests that are decoded together: what one asks for is nothing to another."""

from pathlib import Path
from typing import Any

import pytest
from jobs import result_of

pytestmark = pytest.mark.engine

TOKENS = 6
WANTED = [300, 400, 500]
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


def request(prompt: int, **asked: Any) -> dict[str, Any]:
    """Greedy, and always as long."""
    sampling = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "flat_logprobs": True}
    return {"prompt": PROMPTS[prompt], "sampling": sampling | asked}


CHOOSY = request(0, logprob_token_ids=WANTED)
NEIGHBOURS = [request(1, logprobs=2), request(2, logprobs=0), request(3, logprobs=5), request(1)]
ROUNDS = {
    "alone": [*NEIGHBOURS],
    "in company": [CHOOSY, *NEIGHBOURS],
    "company last": [*NEIGHBOURS, request(0, logprobs=3, logprob_token_ids=WANTED)],
    "few": [request(0, logprob_token_ids=WANTED * 2), request(1, logprobs=2)],
    "choosy alone": [CHOOSY],
    "choosy beside silent": [CHOOSY, request(1)],
}


def run(model: Path, out: Path, unmended: bool = False) -> dict[str, Round]:
    """Runs the rounds in an engine in a process of its own."""
    job = {"model": str(model), "engine": ENGINE, "rounds": list(ROUNDS.values()), "unmended": unmended}
    answers = result_of("run_sampling.py", job, out)
    return {name: [answer["logprobs"] for answer in one] for name, one in zip(ROUNDS, answers, strict=True)}


@pytest.fixture(scope="session")
def rounds(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Round]:
    """What every request was answered."""
    return run(demo, tmp_path_factory.mktemp("logprobs") / "out.json")


def same(ours: Any, theirs: Any) -> bool:
    """Whether two answers are equal but for how sums were rounded."""
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return bool(ours == pytest.approx(theirs, abs=1e-4))


def test_neighbours_keep_their_most_likely_tokens(rounds: dict[str, Round]) -> None:
    assert same(rounds["in company"][1:], rounds["alone"])
    assert same(rounds["company last"][:-1], rounds["alone"])
    assert same(rounds["few"][1], rounds["alone"][0])
    assert [answer and len(answer[0]) for answer in rounds["alone"]] == [3, 1, 6, None]


@pytest.mark.parametrize(("name", "index"), [("in company", 0), ("company last", -1), ("choosy beside silent", 0)])
def test_the_chosen_tokens_are_the_same_in_company(rounds: dict[str, Round], name: str, index: int) -> None:
    (expected,) = rounds["choosy alone"]
    assert same(rounds[name][index], expected)
    assert expected is not None
    assert [[token for token, _, _ in position[1:]] for position in expected] == [WANTED] * TOKENS


def test_a_greedy_token_is_the_first_in_rank_whoever_asks(rounds: dict[str, Round]) -> None:
    answers = [answer for name in rounds for answer in rounds[name] if answer]
    assert {position[0][2] for answer in answers for position in answer} == {1}


def test_vllm_itself_still_needs_the_mend(demo: Path, tmp_path: Path) -> None:
    rounds = run(demo, tmp_path / "out.json", unmended=True)
    assert not same(rounds["in company"][1:], rounds["alone"])
