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
from fakes import INFO, FakeEngine
from hf_search import HfYuan, Search, hf_answers, our_answers, rare_tokens
from reference import ReferenceYuan

from yuan_grpc.model.tokenizer import YuanTokenizer
from yuan_grpc.server import beam as beam_search
from yuan_grpc.server.beam import BeamSearch
from yuan_grpc.server.errors import OverloadedError, ServiceError, UnavailableError
from yuan_grpc.server.generation import Beam, FinishReason, Job, Piece, Position, RankedToken, Sampling, Step

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

    def __init__(self, table: Table, tokens: int, *, context: int = 64, pieces: Sequence[str] = PIECES) -> None:
        super().__init__()
        self.table = table
        self.pieces = pieces
        self.info = replace(INFO, tokens=tokens, context=context)
        self.most_running = 0
        self.before: Callable[[Job], Awaitable[None]] | None = None

    def continuation(self, job: Job, token_ids: Sequence[int], *, ended: bool) -> tuple[str, str | None]:
        text, keeps_end = "", job.sampling.include_stop_str_in_output
        for count, token_id in enumerate(token_ids, start=1):
            before, text = (
                text,
                text + ("" if ended and not keeps_end and count == len(token_ids) else self.pieces[token_id]),
            )
            found = [(text.find(stop, max(0, len(before) - len(stop) + 1)), stop) for stop in job.sampling.stop]
            ends = [(at + len(stop), stop) for at, stop in found if at >= 0]
            if ends and count > job.sampling.min_tokens:
                end, stop = min(ends, key=lambda end: end[0])
                return text[: end if keeps_end else end - len(stop)], stop
        return text, None

    async def generate(self, job: Job, *, stream: bool, cut: asyncio.Event | None = None) -> AsyncGenerator[Step, None]:
        assert job.request_id not in {other.request_id for other in self.asked}
        self.asked.append(job)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            yield Step()
            await asyncio.sleep(0)  # the others begin
            if self.before:
                await self.before(job)
            if cut and cut.is_set():
                yield Step([Piece(0, "", (), finish_reason=FinishReason.DEADLINE)])
                return
            logprobs = self.table(job.prompt)
            order = sorted(range(len(logprobs)), key=lambda token_id: -logprobs[token_id])
            ranked = [RankedToken(i, self.pieces[i], logprobs[i], rank) for rank, i in enumerate(order, start=1)]
            position = Position(ranked[0], ranked[: job.sampling.logprobs])
            yield Step(
                [Piece(0, ranked[0].text, [ranked[0].token_id], [position], finish_reason=FinishReason.LENGTH)],
                cached_tokens=len(job.prompt) - 1,
                prompt_positions=[position] if job.sampling.prompt_logprobs is not None else [],
            )
        finally:
            self.running -= 1


class Found(NamedTuple):
    """A text, whole or, without a reason, not yet."""

    token_ids: tuple[int, ...]
    logprob: float
    reason: FinishReason | None
    stopped_by: str | int | None


def longer(engine: TableEngine, job: Job, before: Found) -> list[Found]:
    """All that may follow, out of the whole vocabulary."""
    return [
        found(engine, job, (*before.token_ids, token_id), before.logprob + logprob)
        for token_id, logprob in enumerate(engine.table([*job.prompt, *before.token_ids]))
        if logprob > -math.inf
        and not (len(before.token_ids) < job.sampling.min_tokens and token_id in {0, *job.sampling.stop_token_ids})
    ]


def found(engine: TableEngine, job: Job, token_ids: tuple[int, ...], logprob: float) -> Found:
    sampling, last = job.sampling, token_ids[-1]
    by_token = last in sampling.stop_token_ids or (last == 0 and not sampling.ignore_eos)
    stop = engine.continuation(job, token_ids, ended=by_token)[1]
    if stop or by_token:
        return Found(token_ids, logprob, FinishReason.STOP, stop or last)
    at_an_end = len(token_ids) == min(sampling.max_tokens, engine.info.context - len(job.prompt))
    return Found(token_ids, logprob, FinishReason.LENGTH if at_an_end else None, None)


def score(job: Job, length_penalty: float, choice: Found | Piece) -> float:
    logprob = choice.logprob if isinstance(choice, Found) else choice.cumulative_logprob
    assert logprob is not None
    length = len(job.prompt) + len(choice.token_ids) - (choice.stopped_by == 0)
    return logprob / math.pow(length, length_penalty)


def every_text(engine: TableEngine, job: Job) -> list[Found]:
    ended: list[Found] = []
    unended = [Found((), 0, None, None)]
    while unended:
        for choice in longer(engine, job, unended.pop()):
            (ended if choice.reason else unended).append(choice)
    return ended


def searched_to_the_end(engine: TableEngine, job: Job, beam: Beam) -> list[Found]:
    """A plain beam search that never stops early: all it has finished."""
    finished, running = [], [Found((), 0, None, None)]
    while running:
        candidates = [choice for before in running for choice in longer(engine, job, before)]
        candidates.sort(key=lambda choice: -choice.logprob)
        finished += [choice for choice in candidates[: beam.width] if choice.reason]
        running = [choice for choice in candidates if not choice.reason][: beam.width]
    return finished


async def all_steps(search: BeamSearch) -> list[Step]:
    async with aclosing(search.steps()) as steps:
        return [step async for step in steps]


async def choices_of(engine: TableEngine, job: Job, beam: Beam) -> Sequence[Piece]:
    steps = await all_steps(BeamSearch(engine, job, beam))
    assert engine.running == 0
    assert [piece.index for piece in steps[-1].pieces] == list(range(len(steps[-1].pieces)))
    return steps[-1].pieces


def assert_best(engine: TableEngine, job: Job, beam: Beam, pieces: Sequence[Piece], of: list[Found]) -> None:
    best = sorted(of, key=lambda choice: -score(job, beam.length_penalty, choice))[: beam.n]
    assert [piece.token_ids for piece in pieces] == [choice.token_ids for choice in best]
    assert [(piece.finish_reason, piece.stopped_by) for piece in pieces] == [
        (one.reason, one.stopped_by) for one in best
    ]
    assert [piece.cumulative_logprob for piece in pieces] == pytest.approx(
        [choice.logprob for choice in best], abs=1e-12
    )
    ended = [piece.stopped_by in (0, *job.sampling.stop_token_ids) for piece in pieces]
    texts = [engine.continuation(job, one.token_ids, ended=end)[0] for one, end in zip(best, ended, strict=True)]
    assert [piece.text for piece in pieces] == texts


def job_of(**sampling: Any) -> Job:
    return Job("job", PROMPT, Sampling(**{"max_tokens": 4} | sampling))


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
kinds = pytest.mark.parametrize("job", KINDS.values(), ids=KINDS.keys())


@kinds
async def test_a_beam_as_wide_as_there_are_texts_finds_the_best_of_all(job: Job) -> None:
    for seed in SEEDS:
        engine = TableEngine(random_table(seed, tokens=4), tokens=4)
        beam = Beam(n=5, width=4**4, length_penalty=[0.0, 1.0, 2.5, -1.0][seed % 4])
        assert_best(engine, job, beam, await choices_of(engine, job, beam), every_text(engine, job))


@kinds
@pytest.mark.parametrize("width", [2, 3, 5])
async def test_a_narrow_beam_that_never_stops_early_finds_what_a_plain_search_does(job: Job, width: int) -> None:
    job = replace(job, sampling=replace(job.sampling, max_tokens=min(6, job.sampling.max_tokens * 2)))
    for seed in SEEDS:
        engine = TableEngine(random_table(seed, tokens=7), tokens=7)
        beam = Beam(2, width, length_penalty=[0.0, 1.0, 2.5, -1.0][seed % 4], early_stopping="never")
        pieces = await choices_of(engine, job, beam)
        assert_best(engine, job, beam, pieces, searched_to_the_end(engine, job, beam))


async def test_many_likely_ending_tokens_leave_enough_that_go_on() -> None:
    def table(token_ids: Sequence[int]) -> Sequence[float]:
        logprobs = random_table(0, tokens=7)(token_ids)
        return [*logprobs[:5], *(logprob - 5 for logprob in logprobs[5:])]

    engine, job = TableEngine(table, tokens=7), job_of(stop_token_ids=[1, 2, 3, 4])
    beam = Beam(2, 2, length_penalty=10, early_stopping="never")
    assert_best(engine, job, beam, await choices_of(engine, job, beam), searched_to_the_end(engine, job, beam))
    assert [len(asked.prompt) for asked in engine.asked] == [2, 3, 3, 4, 4, 5, 5]


async def test_the_context_ends_a_choice_as_max_tokens_does() -> None:
    engine = TableEngine(random_table(0, tokens=4), tokens=4, context=5)
    pieces = await choices_of(engine, job_of(max_tokens=50, ignore_eos=True), Beam(2, 2))
    assert [(len(piece.token_ids), piece.finish_reason) for piece in pieces] == [(3, FinishReason.LENGTH)] * 2


async def test_each_mode_of_early_stopping_searches_longer_and_finds_no_worse() -> None:
    """The search is the same one, and stops later."""
    modes: tuple[bool | Literal["never"], ...] = (True, False, "never")
    steps_taken, job = [], job_of(max_tokens=12)
    for seed in range(40):
        penalty, lengths, scores = [0.5, 1.0, 3.0][seed % 3], [], []
        for mode in modes:
            engine = TableEngine(random_table(seed, tokens=5), tokens=5)
            steps = await all_steps(BeamSearch(engine, job, Beam(1, 2, penalty, early_stopping=mode)))
            lengths.append(len(steps))
            assert all(step.progress.finished <= 2 for step in steps if step.progress)
            scores.append(score(job, penalty, steps[-1].pieces[0]))
        assert (lengths, scores) == (sorted(lengths), sorted(scores))
        steps_taken.append(lengths)
    assert all(any(one[i] < one[i + 1] for one in steps_taken) for i in (0, 1))


async def test_early_stopping_ends_with_as_many_finished_as_the_beam_is_wide() -> None:
    async def finished(early_stopping: bool) -> list[int]:
        engine = TableEngine(random_table(3, tokens=4), tokens=4)
        search = BeamSearch(engine, job_of(max_tokens=30), Beam(2, 3, early_stopping=early_stopping))
        return [step.progress.finished for step in await all_steps(search) if step.progress]

    *before, last = await finished(True)
    assert last == 3
    assert all(count < 3 for count in before)


@pytest.mark.parametrize(("length_penalty", "best"), [(0.7, (0,)), (1.0, (1, 0))])
async def test_the_length_counts_the_prompt_and_not_the_end_of_text(length_penalty: float, best: tuple[int]) -> None:
    def table(token_ids: Sequence[int]) -> Sequence[float]:
        return [-1.5, -0.6, -9] if len(token_ids) == 2 else [-1.5, -9, -9]

    # -1.5 / 2**p is -2.1 / 3**p where p is 0.83. With the ends counted that were 1.17, without the prompt 0.49.
    engine = TableEngine(table, tokens=3)
    pieces = await choices_of(engine, job_of(max_tokens=2), Beam(1, 2, length_penalty, early_stopping="never"))
    assert pieces[0].token_ids == best


async def test_each_beam_is_one_job_of_one_token_and_a_steps_beams_run_together() -> None:
    engine = TableEngine(random_table(0, tokens=7), tokens=7)
    sampling = Sampling(
        max_tokens=3, ignore_eos=True, prompt_logprobs=1, skip_reading_prefix_cache=True, stop=["zzz"], logprobs=2
    )
    job = Job("job", PROMPT, sampling, priority=5, cache_salt="salt", lora="style")
    await all_steps(BeamSearch(engine, job, Beam(1, 3)))
    child = Sampling(max_tokens=1, temperature=0, logprobs=6, ignore_eos=True)
    first = replace(child, prompt_logprobs=1, skip_reading_prefix_cache=True)
    assert [asked.sampling for asked in engine.asked] == [first] + [child] * 6
    assert [len(asked.prompt) for asked in engine.asked] == [2, 3, 3, 3, 4, 4, 4]
    assert {(asked.priority, asked.cache_salt, asked.lora) for asked in engine.asked} == {(5, "salt", "style")}
    assert engine.most_running == 3


async def test_acceptance_comes_first_then_progress_then_the_choices() -> None:
    engine = TableEngine(random_table(1, tokens=5), tokens=5)
    job = job_of(ignore_eos=True, prompt_logprobs=0)
    accepted, *between, last = await all_steps(BeamSearch(engine, job, Beam(2, 3)))
    assert accepted == Step()
    assert [step.progress and step.progress.tokens for step in between] == [1, 2, 3, 4]
    assert [step.progress and step.progress.finished for step in between] == [0, 0, 0, 3]
    assert [len(step.prompt_positions) for step in between] == [1, 0, 0, 0]
    assert {step.cached_tokens for step in (*between, last)} == {1}
    assert between[-1].progress is not None
    best = (last.pieces[0].text, last.pieces[0].cumulative_logprob)
    assert (between[-1].progress.best_text, between[-1].progress.best_cumulative_logprob) == best
    assert last.discarded_tokens == 4


@pytest.mark.parametrize("logprobs", [None, 0, 2, 6])
async def test_positions_have_the_chosen_tokens_true_rank_and_the_most_likely(logprobs: int | None) -> None:
    engine = TableEngine(random_table(2, tokens=7), tokens=7)
    job = job_of(logprobs=logprobs)
    pieces = await choices_of(engine, job, Beam(2, 2))
    for piece in pieces:
        if logprobs is None:
            assert not piece.positions
            continue
        assert [position.chosen.token_id for position in piece.positions] == list(piece.token_ids)
        assert sum(position.chosen.logprob for position in piece.positions) == piece.cumulative_logprob
        for index, position in enumerate(piece.positions):
            behind = engine.table([*PROMPT, *piece.token_ids[:index]])
            assert position.chosen.rank == sum(other >= position.chosen.logprob for other in behind)
            assert [token.logprob for token in position.top] == sorted(behind, reverse=True)[:logprobs]


async def test_a_beam_wider_than_there_are_texts_finds_them_all() -> None:
    engine = TableEngine(lambda _: [math.log(0.5), math.log(0.5)], tokens=2)
    pieces = await choices_of(engine, job_of(max_tokens=2), Beam(6, 6))
    assert {piece.token_ids for piece in pieces} == {(0,), (1, 0), (1, 1)}


async def test_a_model_that_gives_no_token_a_probability_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no token a probability"):
        await choices_of(TableEngine(lambda _: [math.nan, math.nan], tokens=2), job_of(), Beam(1, 2))


async def test_a_search_cut_before_it_has_anything_ends_with_empty_choices() -> None:
    cut = asyncio.Event()
    cut.set()
    search = BeamSearch(TableEngine(random_table(0, tokens=5), tokens=5), job_of(), Beam(3, 4), cut=cut)
    *_, end = await all_steps(search)
    assert [(piece.index, piece.text, piece.finish_reason) for piece in end.pieces] == [
        (index, "", FinishReason.DEADLINE) for index in range(3)
    ]


async def test_a_search_cut_short_ends_with_the_best_of_what_is_finished_and_what_is_not() -> None:
    seen = set()
    for seed in SEEDS:
        job, cut = job_of(max_tokens=9, logprobs=1), asyncio.Event()
        engine = TableEngine(random_table(seed, tokens=5), tokens=5)
        search = BeamSearch(engine, job, Beam(2, 3, early_stopping="never"), cut=cut)
        async with aclosing(search.steps()) as steps:
            for _ in range(4):
                await anext(steps)
            cut.set()
            (end,) = [step async for step in steps]
        assert [piece.index for piece in end.pieces] == [0, 1]
        assert score(job, 1.0, end.pieces[0]) >= score(job, 1.0, end.pieces[1])
        for piece in end.pieces:
            assert (len(piece.token_ids) == 3) or piece.finish_reason is FinishReason.STOP
            assert len(piece.positions) == len(piece.token_ids)
            seen.add(piece.finish_reason)
    assert seen == {FinishReason.STOP, FinishReason.DEADLINE}


async def test_nothing_is_the_worst_of_what_a_search_cut_short_has() -> None:
    cut, engine = asyncio.Event(), TableEngine(lambda _: [math.log(0.5), math.log(0.5)], tokens=2)
    async with aclosing(BeamSearch(engine, job_of(max_tokens=9), Beam(3, 4), cut=cut).steps()) as steps:
        for _ in range(2):
            await anext(steps)
        cut.set()
        (end,) = [step async for step in steps]
    assert [len(piece.token_ids) for piece in end.pieces] == [1, 1, 0]


class Held:
    """Holds the jobs of one length until they are let go, once they are accepted; `all_there` is set when so many
    are."""

    def __init__(self, tokens: int, jobs: int) -> None:
        self.length = len(PROMPT) + tokens
        self.missing = jobs
        self.all_there = asyncio.Event()
        self.go = asyncio.Event()

    async def __call__(self, job: Job) -> None:
        if len(job.prompt) == self.length:
            self.missing -= 1
            if not self.missing:
                self.all_there.set()
            await self.go.wait()


WHEREVER_IT_IS = pytest.mark.parametrize(("tokens", "jobs"), [(0, 1), (1, 3), (3, 3)])


@WHEREVER_IT_IS
async def test_a_cancelled_search_frees_every_job(tokens: int, jobs: int) -> None:
    engine = TableEngine(random_table(0, tokens=5), tokens=5)
    engine.before = held = Held(tokens, jobs)
    task = asyncio.create_task(all_steps(BeamSearch(engine, job_of(ignore_eos=True), Beam(2, 3))))
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
    search = BeamSearch(engine, job_of(ignore_eos=True), Beam(2, 3), cut=held.go)
    task = asyncio.create_task(all_steps(search))
    await held.all_there.wait()
    held.go.set()
    *_, end = await task
    assert [len(piece.token_ids) for piece in end.pieces] == [tokens] * 2
    assert engine.running == 0


@pytest.mark.parametrize("taken", [1, 2, 4])
async def test_a_closed_search_leaves_no_job(taken: int) -> None:
    engine = TableEngine(random_table(0, tokens=5), tokens=5)
    steps = BeamSearch(engine, job_of(), Beam(2, 3)).steps()
    for _ in range(taken):
        await anext(steps)
    await steps.aclose()
    assert engine.running == 0


@pytest.mark.parametrize("error", [UnavailableError("lost"), KeyError("ours")], ids=["service", "internal"])
async def test_one_beams_error_ends_the_others_and_comes_plain(error: Exception) -> None:
    engine, cause = TableEngine(random_table(0, tokens=5), tokens=5), ValueError("why")
    held = Held(tokens=1, jobs=2)

    async def before(job: Job) -> None:
        if len(job.prompt) == held.length and not held.missing:
            raise error from cause
        await held(job)

    engine.before = before
    with pytest.raises(type(error)) as raised:
        await all_steps(BeamSearch(engine, job_of(ignore_eos=True), Beam(2, 3)))
    assert (raised.value, raised.value.__cause__) == (error, cause)
    assert engine.running == 0


async def test_a_beam_that_a_full_engine_refuses_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beam_search, "RETRY_SECONDS", 0)
    job, beam = job_of(ignore_eos=True), Beam(2, 3)
    expected = await choices_of(TableEngine(random_table(0, tokens=5), tokens=5), job, beam)
    engine, refusals = TableEngine(random_table(0, tokens=5), tokens=5), 0

    async def before(job: Job) -> None:
        nonlocal refusals
        if len(job.prompt) > len(PROMPT) and engine.running > 1:
            refusals += 1
            raise OverloadedError("full")

    engine.before = before
    assert await choices_of(engine, job, beam) == expected
    assert refusals > 0


async def test_a_search_that_a_full_engine_refuses_at_first_is_refused() -> None:
    async def before(job: Job) -> None:
        raise OverloadedError("full")

    engine = TableEngine(random_table(0, tokens=5), tokens=5)
    engine.before = before
    with pytest.raises(ServiceError, match="full"):
        await all_steps(BeamSearch(engine, job_of(), Beam(2, 3)))
    assert engine.running == 0


async def test_scores_fall_and_no_text_comes_twice() -> None:
    for seed in SEEDS:
        job = job_of(max_tokens=8)
        pieces = await choices_of(TableEngine(random_table(seed, tokens=6), tokens=6), job, Beam(4, 4, 0.7))
        assert len({piece.token_ids for piece in pieces}) == 4
        assert all(score(job, 0.7, one) >= score(job, 0.7, other) for one, other in pairwise(pieces))


async def test_on_the_reference_model_it_finds_what_transformers_finds(demo: Path) -> None:
    tokenizer = YuanTokenizer.from_pretrained(demo)
    model = HfYuan(reference := ReferenceYuan(demo, len(tokenizer)))
    engine = TableEngine(
        lambda ids: reference.logprobs(list(ids))[-1].tolist(), len(tokenizer), pieces=["?"] * len(tokenizer)
    )
    prompt = tokenizer.encode("世界上最高的山是什么")
    ends = rare_tokens(model, prompt, width=8)
    for early_stopping in (True, False):
        search = Search(prompt, 8, ends, early_stopping)
        ours, theirs = await our_answers(engine, search), hf_answers(model, search)
        assert [list(piece.token_ids) for piece in ours] == [token_ids for token_ids, _ in theirs]
        logprobs = [logprob for _, logprob in theirs]
        assert [piece.cumulative_logprob for piece in ours] == pytest.approx(logprobs, abs=1e-4)
