"""Beam search on the real engine: the choices equal those of transformers, and no engine request is left over."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from engine.conftest import Served
from hf_search import HfYuan, Search, hf_choices, our_choices, rare_tokens
from reference import ReferenceYuan

from yuan_grpc.model.tokenizer import YuanTokenizer
from yuan_grpc.server.core.beam_search import BeamSearch
from yuan_grpc.server.engine.types import BeamSearchParams, EngineRequest, FinishReason, Sampling, StepOutput

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

PROMPTS = ("世界上最高的山是什么", "The quick", "def f(x):\n")
TOLERANCE = 1e-4


@pytest.fixture
def engine(served: Served) -> Any:
    """The demo model on vLLM."""
    return served.engine


@pytest.fixture(scope="module")
def tokenizer(demo: Path) -> YuanTokenizer:
    return YuanTokenizer.from_pretrained(demo)


@pytest.fixture(scope="module")
def model(demo: Path, tokenizer: YuanTokenizer) -> HfYuan:
    """The reference model for transformers."""
    return HfYuan(ReferenceYuan(demo, len(tokenizer)))


async def assert_equal(engine: Any, model: HfYuan, search: Search) -> list[int]:
    """Assert that the choices equal those of transformers; return their lengths. `pytest -s` shows the difference."""
    ours, theirs = await our_choices(engine, search), hf_choices(model, search)
    assert [list(delta.token_ids) for delta in ours] == [token_ids for token_ids, _ in theirs]
    pairs = zip(ours, theirs, strict=True)
    difference = max(abs((delta.cumulative_logprob or 0) - logprob) for delta, (_, logprob) in pairs)
    print(f"largest difference: {difference:.1e}")
    assert difference < TOLERANCE
    return [len(delta.token_ids) for delta in ours]


@pytest.mark.parametrize("width", [2, 4, 8])
@pytest.mark.parametrize("text", PROMPTS, ids=["chinese", "english", "code"])
async def test_the_choices_equal_those_of_transformers(
    engine: Any, model: HfYuan, tokenizer: YuanTokenizer, text: str, width: int
) -> None:
    prompt = tokenizer.encode(text)
    ends = rare_tokens(model, prompt, width=8)
    lengths = await assert_equal(engine, model, Search(prompt, width, length_penalty=1.0))
    for early_stopping in (True, False, "never"):
        search = Search(prompt, width, ends, early_stopping)
        lengths += await assert_equal(engine, model, search)
    assert len(set(lengths)) > 1 or width < 8


async def test_a_choice_has_the_same_logprobs_and_text_as_the_engine_gives_it_as_a_prompt(
    engine: Any, tokenizer: YuanTokenizer
) -> None:
    prompt = tokenizer.encode(PROMPTS[0])
    sampling = Sampling(max_tokens=6, logprobs=3, stop=["以"], prompt_logprobs=2, skip_special_tokens=False)
    request = EngineRequest("beam", prompt, sampling)
    async with aclosing(BeamSearch(engine, request, BeamSearchParams(3, 4)).run()) as outputs:
        accepted, first, *_, last = [output async for output in outputs]
    assert accepted == StepOutput()
    assert len(first.prompt_logprobs) == len(prompt)
    assert [delta.index for delta in last.deltas] == [0, 1, 2]
    for delta in last.deltas:
        scoring = EngineRequest("scoring", [*prompt, *delta.token_ids], Sampling(max_tokens=1, prompt_logprobs=3))
        async with aclosing(engine.generate(scoring, stream=False)) as outputs:
            positions = [position async for output in outputs for position in output.prompt_logprobs][len(prompt) :]
        logprobs = [position.chosen.logprob for position in positions]
        assert [position.chosen.logprob for position in delta.logprobs] == pytest.approx(logprobs, abs=TOLERANCE)
        ranks = [position.chosen.rank for position in positions]
        assert [position.chosen.rank for position in delta.logprobs] == ranks
        assert [[token.rank for token in position.top] for position in delta.logprobs] == [[1, 2, 3]] * len(ranks)
        text, stop_reason = engine.decode_continuation(request, delta.token_ids, ended=False)
        assert (delta.text, delta.stop_reason) == (text, stop_reason)
        assert delta.finish_reason is (FinishReason.STOP if stop_reason else FinishReason.LENGTH)
    assert {delta.stop_reason for delta in last.deltas} == {"以", None}


class WatchedEngine:
    """Wraps an engine; `all_accepted` is set once the expected number of requests has been accepted."""

    def __init__(self, engine: Any, requests: int) -> None:
        self._engine = engine
        self._missing = requests
        self.all_accepted = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate(
        self, request: EngineRequest, *, stream: bool, deadline: asyncio.Event | None = None
    ) -> AsyncGenerator[StepOutput, None]:
        async with aclosing(self._engine.generate(request, stream=stream, deadline=deadline)) as outputs:
            async for output in outputs:
                self._missing -= not output.deltas
                if not self._missing:
                    self.all_accepted.set()
                yield output


@pytest.mark.timeout(120)  # without the cancellation the search takes longer
@pytest.mark.parametrize("at_deadline", [False, True], ids=["cancelled", "deadline"])
@pytest.mark.parametrize(("requests", "tokens"), [(1, 0), (17, 1), (40, 3)])
async def test_a_search_that_ends_early_frees_its_engine_requests(
    engine: Any, tokenizer: YuanTokenizer, requests: int, tokens: int, at_deadline: bool
) -> None:
    """Ends with the first request in the engine, with all requests of a step, and with a part of them."""
    watched, deadline = WatchedEngine(engine, requests), asyncio.Event()
    request = EngineRequest("ended", tokenizer.encode(PROMPTS[0]), Sampling(max_tokens=2000, ignore_eos=True))

    async def run() -> list[StepOutput]:
        async with aclosing(BeamSearch(watched, request, BeamSearchParams(8, 16), deadline=deadline).run()) as outputs:
            return [output async for output in outputs]

    task = asyncio.create_task(run())
    await watched.all_accepted.wait()
    assert engine._llm.get_num_unfinished_requests() > 0
    if at_deadline:
        deadline.set()
        *_, end = await task
        assert [len(delta.token_ids) for delta in end.deltas] == [tokens] * 8
        assert {delta.finish_reason for delta in end.deltas} == {FinishReason.DEADLINE}
    else:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert engine._llm.get_num_unfinished_requests() == 0
    assert await engine._llm.reset_prefix_cache()
