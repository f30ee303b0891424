"""Beam search over an engine by hand, whose next tokens are known: against every possible text, and a plain search."""

import asyncio
import math
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
from fake_engine import INFO, FakeEngine
from hf_search import HfYuan, Search, hf_answers, our_answers, rare_tokens
from reference import ReferenceYuan

from yuan_grpc.model.tokenizer import YuanTokenizer
from yuan_grpc.server.core import beam_search
from yuan_grpc.server.core.beam_search import BeamSearch
from yuan_grpc.server.engine.types import (
    BeamSearchParams,
    ChoiceDelta,
    EngineRequest,
    FinishReason,
    RankedToken,
    Sampling,
    StepOutput,
    TokenLogprobs,
)
from yuan_grpc.server.errors import OverloadedError, ServiceError, UnavailableError

PIECES = ("", "a", "b", "ab", "ba", "c", "<s>")
"""Of so many as a vocabulary has; 0 is the end-of-text token."""
PROMPT = (1, 2)
SEEDS = range(12)

Table = Callable[[Sequence[int]], Sequence[float]]
"""The log-probabilities of every token behind some."""


def random_table(seed: int, tokens: int) -> Table:
    """A distribution of its own behind every beginning; the last token is sometimes impossible."""

    def table(token_ids: Sequence[int]) -> Sequence[float]:
        generator = random.Random(f"{seed} {list(token_ids)}")
        weights = [generator.expovariate(1) ** 2 for _ in range(tokens)]
        weights[-1] *= generator.random() < 0.8
        return [math.log(weight / sum(weights)) if weight else -math.inf for weight in weights]

    return table


class TableEngine(FakeEngine):
    """Gives the most likely tokens of a table. `before` may keep a job from going on once it is accepted."""

    def __init__(self, table: Table, tokens: int, *, context: int = 64, deltas: Sequence[str] = PIECES) -> None:
        super().__init__()
        self.table = table
        self.deltas = deltas
        self.info = replace(INFO, vocab_size=tokens, max_model_len=context)
        self.most_running = 0
        self.before: Callable[[EngineRequest], Awaitable[None]] | None = None

    def decode_continuation(
        self, search_request: EngineRequest, token_ids: Sequence[int], *, ended: bool
    ) -> tuple[str, str | None]:
        text, keeps_end = "", search_request.sampling.include_stop_str_in_output
        for count, token_id in enumerate(token_ids, start=1):
            before, text = (
                text,
                text + ("" if ended and not keeps_end and count == len(token_ids) else self.deltas[token_id]),
            )
            found = [
                (text.find(stop, max(0, len(before) - len(stop) + 1)), stop) for stop in search_request.sampling.stop
            ]
            ends = [(at + len(stop), stop) for at, stop in found if at >= 0]
            if ends and count > search_request.sampling.min_tokens:
                end, stop = min(ends, key=lambda end: end[0])
                return text[: end if keeps_end else end - len(stop)], stop
        return text, None

    async def generate(
        self, search_request: EngineRequest, *, stream: bool, deadline: asyncio.Event | None = None
    ) -> AsyncGenerator[StepOutput, None]:
        assert search_request.request_id not in {other.request_id for other in self.requests}
        self.requests.append(search_request)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            yield StepOutput()
            await asyncio.sleep(0)  # the others begin
            if self.before:
                await self.before(search_request)
            if deadline and deadline.is_set():
                yield StepOutput([ChoiceDelta(0, "", (), finish_reason=FinishReason.DEADLINE)])
                return
            logprobs = self.table(search_request.prompt)
            order = sorted(range(len(logprobs)), key=lambda token_id: -logprobs[token_id])
            ranked = [RankedToken(i, self.deltas[i], logprobs[i], rank) for rank, i in enumerate(order, start=1)]
            position = TokenLogprobs(ranked[0], ranked[: search_request.sampling.logprobs])
            yield StepOutput(
                [ChoiceDelta(0, ranked[0].text, [ranked[0].token_id], [position], finish_reason=FinishReason.LENGTH)],
                cached_tokens=len(search_request.prompt) - 1,
                prompt_logprobs=[position] if search_request.sampling.prompt_logprobs is not None else [],
            )
        finally:
            self.running -= 1


class Found(NamedTuple):
    """A text, whole or, without a reason, not yet."""

    token_ids: tuple[int, ...]
    logprob: float
    reason: FinishReason | None
    stop_reason: str | int | None


def longer(engine: TableEngine, search_request: EngineRequest, before: Found) -> list[Found]:
    """All that may follow, out of the whole vocabulary."""
    return [
        found(engine, search_request, (*before.token_ids, token_id), before.logprob + logprob)
        for token_id, logprob in enumerate(engine.table([*search_request.prompt, *before.token_ids]))
        if logprob > -math.inf
        and not (
            len(before.token_ids) < search_request.sampling.min_tokens
            and token_id in {0, *search_request.sampling.stop_token_ids}
        )
    ]


def found(engine: TableEngine, search_request: EngineRequest, token_ids: tuple[int, ...], logprob: float) -> Found:
    sampling, last = search_request.sampling, token_ids[-1]
    by_token = last in sampling.stop_token_ids or (last == 0 and not sampling.ignore_eos)
    stop = engine.decode_continuation(search_request, token_ids, ended=by_token)[1]
    if stop or by_token:
        return Found(token_ids, logprob, FinishReason.STOP, stop or last)
    at_an_end = len(token_ids) == min(sampling.max_tokens, engine.info.max_model_len - len(search_request.prompt))
    return Found(token_ids, logprob, FinishReason.LENGTH if at_an_end else None, None)


def score(search_request: EngineRequest, length_penalty: float, choice: Found | ChoiceDelta) -> float:
    logprob = choice.logprob if isinstance(choice, Found) else choice.cumulative_logprob
    assert logprob is not None
    length = len(search_request.prompt) + len(choice.token_ids) - (choice.stop_reason == 0)
    return logprob / math.pow(length, length_penalty)


def every_text(engine: TableEngine, search_request: EngineRequest) -> list[Found]:
    ended: list[Found] = []
    unended = [Found((), 0, None, None)]
    while unended:
        for choice in longer(engine, search_request, unended.pop()):
            (ended if choice.reason else unended).append(choice)
    return ended


def searched_to_the_end(engine: TableEngine, search_request: EngineRequest, beam: BeamSearchParams) -> list[Found]:
    """A plain beam search that never stops early: all it has finished."""
    finished, running = [], [Found((), 0, None, None)]
    while running:
        candidates = [choice for before in running for choice in longer(engine, search_request, before)]
        candidates.sort(key=lambda choice: -choice.logprob)
        finished += [choice for choice in candidates[: beam.width] if choice.reason]
        running = [choice for choice in candidates if not choice.reason][: beam.width]
    return finished


async def all_steps(search: BeamSearch) -> list[StepOutput]:
    async with aclosing(search.run()) as outputs:
        return [output async for output in outputs]


async def choices_of(
    engine: TableEngine, search_request: EngineRequest, beam: BeamSearchParams
) -> Sequence[ChoiceDelta]:
    outputs = await all_steps(BeamSearch(engine, search_request, beam))
    assert engine.running == 0
    assert [delta.index for delta in outputs[-1].deltas] == list(range(len(outputs[-1].deltas)))
    return outputs[-1].deltas


def assert_best(
    engine: TableEngine,
    search_request: EngineRequest,
    beam: BeamSearchParams,
    deltas: Sequence[ChoiceDelta],
    of: list[Found],
) -> None:
    best = sorted(of, key=lambda choice: -score(search_request, beam.length_penalty, choice))[: beam.n]
    assert [delta.token_ids for delta in deltas] == [choice.token_ids for choice in best]
    assert [(delta.finish_reason, delta.stop_reason) for delta in deltas] == [
        (one.reason, one.stop_reason) for one in best
    ]
    assert [delta.cumulative_logprob for delta in deltas] == pytest.approx(
        [choice.logprob for choice in best], abs=1e-12
    )
    ended = [delta.stop_reason in (0, *search_request.sampling.stop_token_ids) for delta in deltas]
    texts = [
        engine.decode_continuation(search_request, one.token_ids, ended=end)[0]
        for one, end in zip(best, ended, strict=True)
    ]
    assert [delta.text for delta in deltas] == texts


def job_of(**sampling: Any) -> EngineRequest:
    return EngineRequest("job", PROMPT, Sampling(**{"max_tokens": 4} | sampling))


KINDS = {
    "plain": job_of(ignore_eos=True),
    "end of text": job_of(),
    "one token": job_of(max_tokens=1),
    "min_tokens": job_of(min_tokens=2),
    "min_tokens all along": job_of(min_tokens=4),
    "min_tokens without an end": job_of(min_tokens=2, ignore_eos=True),
    "stop tokens": job_of(stop_token_ids=[2, 3], ignore_eos=True),
    "all ends": job_of(stop_token_ids=[3], stop=["ba"]),
    "stop strings": job_of(stop=["bb", "aba"]),
    "a stop string in a stop token": job_of(stop=["b"], stop_token_ids=[2], include_stop_str_in_output=True),
    "a stop string after min_tokens": job_of(stop=["a"], min_tokens=2, stop_token_ids=[2]),
}
kinds = pytest.mark.parametrize("search_request", KINDS.values(), ids=KINDS.keys())


@kinds
async def test_a_beam_as_wide_as_there_are_texts_finds_the_best_of_all(search_request: EngineRequest) -> None:
    for seed in SEEDS:
        engine = TableEngine(random_table(seed, tokens=4), tokens=4)
        beam = BeamSearchParams(n=5, width=4**4, length_penalty=[0.0, 1.0, 2.5, -1.0][seed % 4])
        assert_best(
            engine,
            search_request,
            beam,
            await choices_of(engine, search_request, beam),
            every_text(engine, search_request),
        )


@kinds
@pytest.mark.parametrize("width", [2, 3, 5])
async def test_a_narrow_beam_that_never_stops_early_finds_what_a_plain_search_does(
    search_request: EngineRequest, width: int
) -> None:
    search_request = replace(
        search_request,
        sampling=replace(search_request.sampling, max_tokens=min(6, search_request.sampling.max_tokens * 2)),
    )
    for seed in SEEDS:
        engine = TableEngine(random_table(seed, tokens=7), tokens=7)
        beam = BeamSearchParams(2, width, length_penalty=[0.0, 1.0, 2.5, -1.0][seed % 4], early_stopping="never")
        deltas = await choices_of(engine, search_request, beam)
        assert_best(engine, search_request, beam, deltas, searched_to_the_end(engine, search_request, beam))


async def test_many_likely_ending_tokens_leave_enough_that_go_on() -> None:
    def table(token_ids: Sequence[int]) -> Sequence[float]:
        logprobs = random_table(0, tokens=7)(token_ids)
        return [*logprobs[:5], *(logprob - 5 for logprob in logprobs[5:])]

    engine, search_request = TableEngine(table, tokens=7), job_of(stop_token_ids=[1, 2, 3, 4])
    beam = BeamSearchParams(2, 2, length_penalty=10, early_stopping="never")
    assert_best(
        engine,
        search_request,
        beam,
        await choices_of(engine, search_request, beam),
        searched_to_the_end(engine, search_request, beam),
    )
    assert [len(asked.prompt) for asked in engine.requests] == [2, 3, 3, 4, 4, 5, 5]


async def test_the_context_ends_a_choice_as_max_tokens_does() -> None:
    engine = TableEngine(random_table(0, tokens=4), tokens=4, context=5)
    deltas = await choices_of(engine, job_of(max_tokens=50, ignore_eos=True), BeamSearchParams(2, 2))
    assert [(len(delta.token_ids), delta.finish_reason) for delta in deltas] == [(3, FinishReason.LENGTH)] * 2


async def test_each_mode_of_early_stopping_searches_longer_and_finds_no_worse() -> None:
    """The search is the same one, and stops later."""
    modes: tuple[bool | Literal["never"], ...] = (True, False, "never")
    steps_taken, search_request = [], job_of(max_tokens=12)
    for seed in range(40):
        penalty, lengths, scores = [0.5, 1.0, 3.0][seed % 3], [], []
        for mode in modes:
            engine = TableEngine(random_table(seed, tokens=5), tokens=5)
            outputs = await all_steps(
                BeamSearch(engine, search_request, BeamSearchParams(1, 2, penalty, early_stopping=mode))
            )
            lengths.append(len(outputs))
            assert all(output.progress.finished <= 2 for output in outputs if output.progress)
            scores.append(score(search_request, penalty, outputs[-1].deltas[0]))
        assert (lengths, scores) == (sorted(lengths), sorted(scores))
        steps_taken.append(lengths)
    assert all(any(one[i] < one[i + 1] for one in steps_taken) for i in (0, 1))


async def test_early_stopping_ends_with_as_many_finished_as_the_beam_is_wide() -> None:
    async def finished(early_stopping: bool) -> list[int]:
        engine = TableEngine(random_table(3, tokens=4), tokens=4)
        search = BeamSearch(engine, job_of(max_tokens=30), BeamSearchParams(2, 3, early_stopping=early_stopping))
        return [output.progress.finished for output in await all_steps(search) if output.progress]

    *before, last = await finished(True)
    assert last == 3
    assert all(count < 3 for count in before)


@pytest.mark.parametrize(("length_penalty", "best"), [(0.7, (0,)), (1.0, (1, 0))])
async def test_the_length_counts_the_prompt_and_not_the_end_of_text(length_penalty: float, best: tuple[int]) -> None:
    def table(token_ids: Sequence[int]) -> Sequence[float]:
        return [-1.5, -0.6, -9] if len(token_ids) == 2 else [-1.5, -9, -9]

    # -1.5 / 2**p is -2.1 / 3**p where p is 0.83. With the ends counted that were 1.17, without the prompt 0.49.
    engine = TableEngine(table, tokens=3)
    deltas = await choices_of(
        engine, job_of(max_tokens=2), BeamSearchParams(1, 2, length_penalty, early_stopping="never")
    )
    assert deltas[0].token_ids == best


async def test_each_beam_is_one_job_of_one_token_and_a_steps_beams_run_together() -> None:
    engine = TableEngine(random_table(0, tokens=7), tokens=7)
    sampling = Sampling(
        max_tokens=3, ignore_eos=True, prompt_logprobs=1, skip_reading_prefix_cache=True, stop=["zzz"], logprobs=2
    )
    search_request = EngineRequest("job", PROMPT, sampling, priority=5, cache_salt="salt", lora="style")
    await all_steps(BeamSearch(engine, search_request, BeamSearchParams(1, 3)))
    child = Sampling(max_tokens=1, temperature=0, logprobs=6, ignore_eos=True)
    first = replace(child, prompt_logprobs=1, skip_reading_prefix_cache=True)
    assert [asked.sampling for asked in engine.requests] == [first] + [child] * 6
    assert [len(asked.prompt) for asked in engine.requests] == [2, 3, 3, 3, 4, 4, 4]
    assert {(asked.priority, asked.cache_salt, asked.lora) for asked in engine.requests} == {(5, "salt", "style")}
    assert engine.most_running == 3


async def test_acceptance_comes_first_then_progress_then_the_choices() -> None:
    engine = TableEngine(random_table(1, tokens=5), tokens=5)
    search_request = job_of(ignore_eos=True, prompt_logprobs=0)
    accepted, *between, last = await all_steps(BeamSearch(engine, search_request, BeamSearchParams(2, 3)))
    assert accepted == StepOutput()
    assert [output.progress and output.progress.tokens for output in between] == [1, 2, 3, 4]
    assert [output.progress and output.progress.finished for output in between] == [0, 0, 0, 3]
    assert [len(output.prompt_logprobs) for output in between] == [1, 0, 0, 0]
    assert {output.cached_tokens for output in (*between, last)} == {1}
    assert between[-1].progress is not None
    best = (last.deltas[0].text, last.deltas[0].cumulative_logprob)
    assert (between[-1].progress.best_text, between[-1].progress.best_cumulative_logprob) == best
    assert last.discarded_tokens == 4


@pytest.mark.parametrize("logprobs", [None, 0, 2, 6])
async def test_positions_have_the_chosen_tokens_true_rank_and_the_most_likely(logprobs: int | None) -> None:
    engine = TableEngine(random_table(2, tokens=7), tokens=7)
    search_request = job_of(logprobs=logprobs)
    deltas = await choices_of(engine, search_request, BeamSearchParams(2, 2))
    for delta in deltas:
        if logprobs is None:
            assert not delta.logprobs
            continue
        assert [position.chosen.token_id for position in delta.logprobs] == list(delta.token_ids)
        assert sum(position.chosen.logprob for position in delta.logprobs) == delta.cumulative_logprob
        for index, position in enumerate(delta.logprobs):
            behind = engine.table([*PROMPT, *delta.token_ids[:index]])
            assert position.chosen.rank == sum(other >= position.chosen.logprob for other in behind)
            assert [token.logprob for token in position.top] == sorted(behind, reverse=True)[:logprobs]


async def test_a_beam_wider_than_there_are_texts_finds_them_all() -> None:
    engine = TableEngine(lambda _: [math.log(0.5), math.log(0.5)], tokens=2)
    deltas = await choices_of(engine, job_of(max_tokens=2), BeamSearchParams(6, 6))
    assert {delta.token_ids for delta in deltas} == {(0,), (1, 0), (1, 1)}


async def test_a_model_that_gives_no_token_a_probability_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no token a probability"):
        await choices_of(TableEngine(lambda _: [math.nan, math.nan], tokens=2), job_of(), BeamSearchParams(1, 2))


async def test_a_search_cut_before_it_has_anything_ends_with_empty_choices() -> None:
    deadline = asyncio.Event()
    deadline.set()
    search = BeamSearch(
        TableEngine(random_table(0, tokens=5), tokens=5), job_of(), BeamSearchParams(3, 4), deadline=deadline
    )
    *_, end = await all_steps(search)
    assert [(delta.index, delta.text, delta.finish_reason) for delta in end.deltas] == [
        (index, "", FinishReason.DEADLINE) for index in range(3)
    ]


async def test_a_search_cut_short_ends_with_the_best_of_what_is_finished_and_what_is_not() -> None:
    seen = set()
    for seed in SEEDS:
        search_request, deadline = job_of(max_tokens=9, logprobs=1), asyncio.Event()
        engine = TableEngine(random_table(seed, tokens=5), tokens=5)
        search = BeamSearch(engine, search_request, BeamSearchParams(2, 3, early_stopping="never"), deadline=deadline)
        async with aclosing(search.run()) as outputs:
            for _ in range(4):
                await anext(outputs)
            deadline.set()
            (end,) = [output async for output in outputs]
        assert [delta.index for delta in end.deltas] == [0, 1]
        assert score(search_request, 1.0, end.deltas[0]) >= score(search_request, 1.0, end.deltas[1])
        for delta in end.deltas:
            assert (len(delta.token_ids) == 3) or delta.finish_reason is FinishReason.STOP
            assert len(delta.logprobs) == len(delta.token_ids)
            seen.add(delta.finish_reason)
    assert seen == {FinishReason.STOP, FinishReason.DEADLINE}


async def test_nothing_is_the_worst_of_what_a_search_cut_short_has() -> None:
    deadline, engine = asyncio.Event(), TableEngine(lambda _: [math.log(0.5), math.log(0.5)], tokens=2)
    async with aclosing(
        BeamSearch(engine, job_of(max_tokens=9), BeamSearchParams(3, 4), deadline=deadline).run()
    ) as outputs:
        for _ in range(2):
            await anext(outputs)
        deadline.set()
        (end,) = [output async for output in outputs]
    assert [len(delta.token_ids) for delta in end.deltas] == [1, 1, 0]


class Held:
    """Holds the jobs of one length until they are let go, once they are accepted; `all_there` is set when so many
    are."""

    def __init__(self, tokens: int, jobs: int) -> None:
        self.length = len(PROMPT) + tokens
        self.missing = jobs
        self.all_there = asyncio.Event()
        self.go = asyncio.Event()

    async def __call__(self, search_request: EngineRequest) -> None:
        if len(search_request.prompt) == self.length:
            self.missing -= 1
            if not self.missing:
                self.all_there.set()
            await self.go.wait()


WHEREVER_IT_IS = pytest.mark.parametrize(("tokens", "jobs"), [(0, 1), (1, 3), (3, 3)])


@WHEREVER_IT_IS
async def test_a_cancelled_search_frees_every_job(tokens: int, jobs: int) -> None:
    engine = TableEngine(random_table(0, tokens=5), tokens=5)
    engine.before = held = Held(tokens, jobs)
    task = asyncio.create_task(all_steps(BeamSearch(engine, job_of(ignore_eos=True), BeamSearchParams(2, 3))))
    await held.all_there.wait()
    assert engine.running == jobs
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.running == 0


@WHEREVER_IT_IS
async def test_a_search_cut_short_has_the_tokens_of_all_whole_steps(tokens: int, jobs: int) -> None:
    engine = TableEngine(random_table(0, tokens=5), tokens=5)
    engine.before = held = Held(tokens, jobs)
    search = BeamSearch(engine, job_of(ignore_eos=True), BeamSearchParams(2, 3), deadline=held.go)
    task = asyncio.create_task(all_steps(search))
    await held.all_there.wait()
    held.go.set()
    *_, end = await task
    assert [len(delta.token_ids) for delta in end.deltas] == [tokens] * 2
    assert engine.running == 0


@pytest.mark.parametrize("taken", [1, 2, 4])
async def test_a_closed_search_leaves_no_job(taken: int) -> None:
    engine = TableEngine(random_table(0, tokens=5), tokens=5)
    outputs = BeamSearch(engine, job_of(), BeamSearchParams(2, 3)).run()
    for _ in range(taken):
        await anext(outputs)
    await outputs.aclose()
    assert engine.running == 0


@pytest.mark.parametrize("error", [UnavailableError("lost"), KeyError("ours")], ids=["service", "internal"])
async def test_one_beams_error_ends_the_others_and_comes_plain(error: Exception) -> None:
    engine, cause = TableEngine(random_table(0, tokens=5), tokens=5), ValueError("why")
    held = Held(tokens=1, jobs=2)

    async def before(search_request: EngineRequest) -> None:
        if len(search_request.prompt) == held.length and not held.missing:
            raise error from cause
        await held(search_request)

    engine.before = before
    with pytest.raises(type(error)) as raised:
        await all_steps(BeamSearch(engine, job_of(ignore_eos=True), BeamSearchParams(2, 3)))
    assert (raised.value, raised.value.__cause__) == (error, cause)
    assert engine.running == 0


async def test_a_beam_that_a_full_engine_refuses_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beam_search, "RETRY_SECONDS", 0)
    search_request, beam = job_of(ignore_eos=True), BeamSearchParams(2, 3)
    expected = await choices_of(TableEngine(random_table(0, tokens=5), tokens=5), search_request, beam)
    engine, refusals = TableEngine(random_table(0, tokens=5), tokens=5), 0

    async def before(search_request: EngineRequest) -> None:
        nonlocal refusals
        if len(search_request.prompt) > len(PROMPT) and engine.running > 1:
            refusals += 1
            raise OverloadedError("full")

    engine.before = before
    assert await choices_of(engine, search_request, beam) == expected
    assert refusals > 0


async def test_a_search_that_a_full_engine_refuses_at_first_is_refused() -> None:
    async def before(search_request: EngineRequest) -> None:
        raise OverloadedError("full")

    engine = TableEngine(random_table(0, tokens=5), tokens=5)
    engine.before = before
    with pytest.raises(ServiceError, match="full"):
        await all_steps(BeamSearch(engine, job_of(), BeamSearchParams(2, 3)))
    assert engine.running == 0


async def test_scores_fall_and_no_text_comes_twice() -> None:
    for seed in SEEDS:
        search_request = job_of(max_tokens=8)
        deltas = await choices_of(
            TableEngine(random_table(seed, tokens=6), tokens=6), search_request, BeamSearchParams(4, 4, 0.7)
        )
        assert len({delta.token_ids for delta in deltas}) == 4
        assert all(
            score(search_request, 0.7, one) >= score(search_request, 0.7, other) for one, other in pairwise(deltas)
        )


async def test_on_the_reference_model_it_finds_what_transformers_finds(demo: Path) -> None:
    tokenizer = YuanTokenizer.from_pretrained(demo)
    model = HfYuan(reference := ReferenceYuan(demo, len(tokenizer)))
    engine = TableEngine(
        lambda ids: reference.logprobs(list(ids))[-1].tolist(), len(tokenizer), deltas=["?"] * len(tokenizer)
    )
    prompt = tokenizer.encode("世界上最高的山是什么")
    ends = rare_tokens(model, prompt, width=8)
    for early_stopping in (True, False):
        search = Search(prompt, 8, ends, early_stopping)
        ours, theirs = await our_answers(engine, search), hf_answers(model, search)
        assert [list(delta.token_ids) for delta in ours] == [token_ids for token_ids, _ in theirs]
        logprobs = [logprob for _, logprob in theirs]
        assert [delta.cumulative_logprob for delta in ours] == pytest.approx(logprobs, abs=1e-4)
