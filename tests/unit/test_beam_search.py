"""Beam search over a fake engine with known next tokens, compared with exhaustive search and a plain beam search."""

import asyncio
import math
import random
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
from fake_engine import INFO, FakeEngine

from yuan_grpc.server.core import backoff
from yuan_grpc.server.core.beam_search import BeamSearch
from yuan_grpc.server.core.limits import BeamLimits
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

TOKEN_TEXTS = ("", "a", "b", "ab", "ba", "c", "<s>")
"""The texts of the tokens; a smaller vocabulary has the first of them. 0 is the end-of-text token."""
PROMPT = (1, 2)
SEEDS = range(12)

Table = Callable[[Sequence[int]], Sequence[float]]
"""Maps token ids to the log-probability of every next token."""


def random_table(seed: int, tokens: int) -> Table:
    """Return a table with a different distribution for every prefix; the last token is sometimes impossible."""

    def table(token_ids: Sequence[int]) -> Sequence[float]:
        generator = random.Random(f"{seed} {list(token_ids)}")
        weights = [generator.expovariate(1) ** 2 for _ in range(tokens)]
        weights[-1] *= generator.random() < 0.8
        return [math.log(weight / sum(weights)) if weight else -math.inf for weight in weights]

    return table


class TableEngine(FakeEngine):
    """Yields the most likely tokens of a table. `before` runs after the acceptance, and may block the request."""

    def __init__(self, table: Table, tokens: int, *, context: int = 64, texts: Sequence[str] = TOKEN_TEXTS) -> None:
        super().__init__()
        self.table = table
        self.texts = texts
        self.info = replace(INFO, vocab_size=tokens, max_model_len=context)
        self.most_running = 0
        self.before: Callable[[EngineRequest], Awaitable[None]] | None = None

    def decode_continuation(
        self, request: EngineRequest, token_ids: Sequence[int], *, ended: bool
    ) -> tuple[str, str | None]:
        text, keeps_end = "", request.sampling.include_stop_str_in_output
        for count, token_id in enumerate(token_ids, start=1):
            is_hidden = ended and not keeps_end and count == len(token_ids)
            before, text = text, text + ("" if is_hidden else self.texts[token_id])
            found = [(text.find(stop, max(0, len(before) - len(stop) + 1)), stop) for stop in request.sampling.stop]
            ends = [(at + len(stop), stop) for at, stop in found if at >= 0]
            if ends and count > request.sampling.min_tokens:
                end, stop = min(ends, key=lambda end: end[0])
                return text[: end if keeps_end else end - len(stop)], stop
        return text, None

    async def generate(
        self, request: EngineRequest, *, stream: bool, deadline: asyncio.Event | None = None
    ) -> AsyncGenerator[StepOutput, None]:
        assert request.request_id not in {other.request_id for other in self.requests}
        self.requests.append(request)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            yield StepOutput()
            await asyncio.sleep(0)  # lets the other requests begin
            if self.before:
                await self.before(request)
            if deadline and deadline.is_set():
                yield StepOutput([ChoiceDelta(0, "", (), finish_reason=FinishReason.DEADLINE)])
                return
            logprobs = self.table(request.prompt)
            order = sorted(range(len(logprobs)), key=lambda token_id: -logprobs[token_id])
            ranked = [RankedToken(i, self.texts[i], logprobs[i], rank) for rank, i in enumerate(order, start=1)]
            position = TokenLogprobs(ranked[0], ranked[: request.sampling.logprobs])
            yield StepOutput(
                [ChoiceDelta(0, ranked[0].text, [ranked[0].token_id], [position], finish_reason=FinishReason.LENGTH)],
                cached_tokens=len(request.prompt) - 1,
                prompt_logprobs=[position] if request.sampling.prompt_logprobs is not None else [],
            )
        finally:
            self.running -= 1


class Hypothesis(NamedTuple):
    """A hypothesis, finished if it has a reason."""

    token_ids: tuple[int, ...]
    logprob: float
    reason: FinishReason | None
    stop_reason: str | int | None


def continuations(engine: TableEngine, request: EngineRequest, before: Hypothesis) -> list[Hypothesis]:
    """Return all possible continuations by one token."""
    return [
        hypothesis(engine, request, (*before.token_ids, token_id), before.logprob + logprob)
        for token_id, logprob in enumerate(engine.table([*request.prompt, *before.token_ids]))
        if logprob > -math.inf
        and not (
            len(before.token_ids) < request.sampling.min_tokens and token_id in {0, *request.sampling.stop_token_ids}
        )
    ]


def hypothesis(engine: TableEngine, request: EngineRequest, token_ids: tuple[int, ...], logprob: float) -> Hypothesis:
    sampling, last = request.sampling, token_ids[-1]
    by_token = last in sampling.stop_token_ids or (last == 0 and not sampling.ignore_eos)
    stop = engine.decode_continuation(request, token_ids, ended=by_token)[1]
    if stop or by_token:
        return Hypothesis(token_ids, logprob, FinishReason.STOP, stop or last)
    at_an_end = len(token_ids) == min(sampling.max_tokens, engine.info.max_model_len - len(request.prompt))
    return Hypothesis(token_ids, logprob, FinishReason.LENGTH if at_an_end else None, None)


def score(request: EngineRequest, length_penalty: float, choice: Hypothesis | ChoiceDelta) -> float:
    logprob = choice.logprob if isinstance(choice, Hypothesis) else choice.cumulative_logprob
    assert logprob is not None
    length = len(request.prompt) + len(choice.token_ids) - (choice.stop_reason == 0)
    return logprob / math.pow(length, length_penalty)


def exhaustive_search(engine: TableEngine, request: EngineRequest) -> list[Hypothesis]:
    ended: list[Hypothesis] = []
    unended = [Hypothesis((), 0, None, None)]
    while unended:
        for choice in continuations(engine, request, unended.pop()):
            (ended if choice.reason else unended).append(choice)
    return ended


def plain_search(engine: TableEngine, request: EngineRequest, beam: BeamSearchParams) -> list[Hypothesis]:
    """Return all that a plain beam search finishes that never stops early."""
    finished, running = [], [Hypothesis((), 0, None, None)]
    while running:
        candidates = [choice for before in running for choice in continuations(engine, request, before)]
        candidates.sort(key=lambda choice: -choice.logprob)
        finished += [choice for choice in candidates[: beam.width] if choice.reason]
        running = [choice for choice in candidates if not choice.reason][: beam.width]
    return finished


async def all_outputs(search: BeamSearch) -> list[StepOutput]:
    async with aclosing(search.run()) as outputs:
        return [output async for output in outputs]


async def choices_of(engine: TableEngine, request: EngineRequest, beam: BeamSearchParams) -> Sequence[ChoiceDelta]:
    outputs = await all_outputs(BeamSearch(engine, request, beam))
    assert engine.running == 0
    assert [delta.index for delta in outputs[-1].deltas] == list(range(len(outputs[-1].deltas)))
    return outputs[-1].deltas


def assert_best(
    engine: TableEngine,
    request: EngineRequest,
    beam: BeamSearchParams,
    deltas: Sequence[ChoiceDelta],
    hypotheses: list[Hypothesis],
) -> None:
    best = sorted(hypotheses, key=lambda choice: -score(request, beam.length_penalty, choice))[: beam.n]
    assert [delta.token_ids for delta in deltas] == [choice.token_ids for choice in best]
    assert [(delta.finish_reason, delta.stop_reason) for delta in deltas] == [
        (one.reason, one.stop_reason) for one in best
    ]
    assert [delta.cumulative_logprob for delta in deltas] == pytest.approx(
        [choice.logprob for choice in best], abs=1e-12
    )
    ended = [delta.stop_reason in (0, *request.sampling.stop_token_ids) for delta in deltas]
    texts = [
        engine.decode_continuation(request, one.token_ids, ended=end)[0] for one, end in zip(best, ended, strict=True)
    ]
    assert [delta.text for delta in deltas] == texts


def request_with(**sampling: Any) -> EngineRequest:
    return EngineRequest("id", PROMPT, Sampling(**{"max_tokens": 4} | sampling))


KINDS = {
    "plain": request_with(ignore_eos=True),
    "end of text": request_with(),
    "one token": request_with(max_tokens=1),
    "min_tokens": request_with(min_tokens=2),
    "min_tokens equal to max_tokens": request_with(min_tokens=4),
    "min_tokens with ignore_eos": request_with(min_tokens=2, ignore_eos=True),
    "stop tokens": request_with(stop_token_ids=[2, 3], ignore_eos=True),
    "stop tokens and strings": request_with(stop_token_ids=[3], stop=["ba"]),
    "stop strings": request_with(stop=["bb", "aba"]),
    "a stop string in a stop token": request_with(stop=["b"], stop_token_ids=[2], include_stop_str_in_output=True),
    "a stop string after min_tokens": request_with(stop=["a"], min_tokens=2, stop_token_ids=[2]),
}
kinds = pytest.mark.parametrize("engine_request", KINDS.values(), ids=KINDS.keys())


@kinds
async def test_a_beam_as_wide_as_the_number_of_texts_finds_the_best_of_all(engine_request: EngineRequest) -> None:
    for seed in SEEDS:
        engine = TableEngine(random_table(seed, tokens=4), tokens=4)
        beam = BeamSearchParams(n=5, width=4**4, length_penalty=[0.0, 1.0, 2.5, -1.0][seed % 4])
        assert_best(
            engine,
            engine_request,
            beam,
            await choices_of(engine, engine_request, beam),
            exhaustive_search(engine, engine_request),
        )


@kinds
@pytest.mark.parametrize("width", [2, 3, 5])
async def test_a_narrow_beam_that_never_stops_early_equals_a_plain_search(
    engine_request: EngineRequest, width: int
) -> None:
    engine_request = replace(
        engine_request,
        sampling=replace(engine_request.sampling, max_tokens=min(6, engine_request.sampling.max_tokens * 2)),
    )
    for seed in SEEDS:
        engine = TableEngine(random_table(seed, tokens=7), tokens=7)
        beam = BeamSearchParams(2, width, length_penalty=[0.0, 1.0, 2.5, -1.0][seed % 4], early_stopping="never")
        deltas = await choices_of(engine, engine_request, beam)
        assert_best(engine, engine_request, beam, deltas, plain_search(engine, engine_request, beam))


async def test_many_likely_ending_tokens_leave_enough_to_continue_with() -> None:
    def table(token_ids: Sequence[int]) -> Sequence[float]:
        logprobs = random_table(0, tokens=7)(token_ids)
        return [*logprobs[:5], *(logprob - 5 for logprob in logprobs[5:])]

    engine, request = TableEngine(table, tokens=7), request_with(stop_token_ids=[1, 2, 3, 4])
    beam = BeamSearchParams(2, 2, length_penalty=10, early_stopping="never")
    assert_best(
        engine,
        request,
        beam,
        await choices_of(engine, request, beam),
        plain_search(engine, request, beam),
    )
    assert [len(sent.prompt) for sent in engine.requests] == [2, 3, 3, 4, 4, 5, 5]


async def test_the_context_ends_a_choice_as_max_tokens_does() -> None:
    engine = TableEngine(random_table(0, tokens=4), tokens=4, context=5)
    deltas = await choices_of(engine, request_with(max_tokens=50, ignore_eos=True), BeamSearchParams(2, 2))
    assert [(len(delta.token_ids), delta.finish_reason) for delta in deltas] == [(3, FinishReason.LENGTH)] * 2


@pytest.mark.timeout(60)
async def test_each_mode_of_early_stopping_searches_longer_with_no_worse_result() -> None:
    """The search is the same, but stops later."""
    modes: tuple[bool | Literal["never"], ...] = (True, False, "never")
    runs, request = [], request_with(max_tokens=12)
    for seed in range(40):
        penalty, lengths, scores = [0.5, 1.0, 3.0][seed % 3], [], []
        for mode in modes:
            engine = TableEngine(random_table(seed, tokens=5), tokens=5)
            outputs = await all_outputs(
                BeamSearch(engine, request, BeamSearchParams(1, 2, penalty, early_stopping=mode))
            )
            lengths.append(len(outputs))
            assert all(output.progress.finished <= 2 for output in outputs if output.progress)
            scores.append(score(request, penalty, outputs[-1].deltas[0]))
        assert (lengths, scores) == (sorted(lengths), sorted(scores))
        runs.append(lengths)
    assert all(any(lengths[i] < lengths[i + 1] for lengths in runs) for i in (0, 1))


async def test_early_stopping_ends_once_width_hypotheses_are_finished() -> None:
    async def finished(early_stopping: bool) -> list[int]:
        engine = TableEngine(random_table(3, tokens=4), tokens=4)
        search = BeamSearch(engine, request_with(max_tokens=30), BeamSearchParams(2, 3, early_stopping=early_stopping))
        return [output.progress.finished for output in await all_outputs(search) if output.progress]

    *before, last = await finished(True)
    assert last == 3
    assert all(count < 3 for count in before)


@pytest.mark.parametrize(("length_penalty", "best"), [(0.7, (0,)), (1.0, (1, 0))])
async def test_the_length_includes_the_prompt_but_not_the_end_of_text(length_penalty: float, best: tuple[int]) -> None:
    def table(token_ids: Sequence[int]) -> Sequence[float]:
        return [-1.5, -0.6, -9] if len(token_ids) == 2 else [-1.5, -9, -9]

    # -1.5 / 2**p equals -2.1 / 3**p at p = 0.83. It would be 1.17 with the end tokens, and 0.49 without the prompt.
    engine = TableEngine(table, tokens=3)
    deltas = await choices_of(
        engine, request_with(max_tokens=2), BeamSearchParams(1, 2, length_penalty, early_stopping="never")
    )
    assert deltas[0].token_ids == best


async def test_each_beam_is_one_request_of_one_token_and_the_beams_of_a_step_run_together() -> None:
    engine = TableEngine(random_table(0, tokens=7), tokens=7)
    sampling = Sampling(
        max_tokens=3, ignore_eos=True, prompt_logprobs=1, skip_reading_prefix_cache=True, stop=["zzz"], logprobs=2
    )
    request = EngineRequest("id", PROMPT, sampling, priority=5, cache_salt="salt", lora="style")
    await all_outputs(BeamSearch(engine, request, BeamSearchParams(1, 3)))
    next_token = Sampling(max_tokens=1, temperature=0, logprobs=6, ignore_eos=True)
    first = replace(next_token, prompt_logprobs=1, skip_reading_prefix_cache=True)
    assert [sent.sampling for sent in engine.requests] == [first] + [next_token] * 6
    assert [len(sent.prompt) for sent in engine.requests] == [2, 3, 3, 3, 4, 4, 4]
    assert {(sent.priority, sent.cache_salt, sent.lora) for sent in engine.requests} == {(5, "salt", "style")}
    assert engine.most_running == 3


async def test_outputs_are_acceptance_then_progress_then_choices() -> None:
    engine = TableEngine(random_table(1, tokens=5), tokens=5)
    request = request_with(ignore_eos=True, prompt_logprobs=0)
    accepted, *between, last = await all_outputs(BeamSearch(engine, request, BeamSearchParams(2, 3)))
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
async def test_logprobs_have_the_rank_of_the_chosen_token_and_the_most_likely_tokens(logprobs: int | None) -> None:
    engine = TableEngine(random_table(2, tokens=7), tokens=7)
    request = request_with(logprobs=logprobs)
    deltas = await choices_of(engine, request, BeamSearchParams(2, 2))
    for delta in deltas:
        if logprobs is None:
            assert not delta.logprobs
            continue
        assert [position.chosen.token_id for position in delta.logprobs] == list(delta.token_ids)
        assert sum(position.chosen.logprob for position in delta.logprobs) == delta.cumulative_logprob
        for index, position in enumerate(delta.logprobs):
            expected = engine.table([*PROMPT, *delta.token_ids[:index]])
            assert position.chosen.rank == sum(other >= position.chosen.logprob for other in expected)
            assert [token.logprob for token in position.top] == sorted(expected, reverse=True)[:logprobs]


async def test_a_beam_wider_than_the_number_of_texts_finds_all() -> None:
    engine = TableEngine(lambda _: [math.log(0.5), math.log(0.5)], tokens=2)
    deltas = await choices_of(engine, request_with(max_tokens=2), BeamSearchParams(6, 6))
    assert {delta.token_ids for delta in deltas} == {(0,), (1, 0), (1, 1)}


async def test_a_model_that_gives_no_token_a_probability_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no token a probability"):
        await choices_of(TableEngine(lambda _: [math.nan, math.nan], tokens=2), request_with(), BeamSearchParams(1, 2))


async def test_a_deadline_before_the_first_token_yields_empty_choices() -> None:
    deadline = asyncio.Event()
    deadline.set()
    search = BeamSearch(
        TableEngine(random_table(0, tokens=5), tokens=5), request_with(), BeamSearchParams(3, 4), deadline=deadline
    )
    *_, end = await all_outputs(search)
    assert [(delta.index, delta.text, delta.finish_reason) for delta in end.deltas] == [
        (index, "", FinishReason.DEADLINE) for index in range(3)
    ]


async def test_at_the_deadline_the_best_finished_and_running_hypotheses_are_returned() -> None:
    seen = set()
    for seed in SEEDS:
        request, deadline = request_with(max_tokens=9, logprobs=1), asyncio.Event()
        engine = TableEngine(random_table(seed, tokens=5), tokens=5)
        search = BeamSearch(engine, request, BeamSearchParams(2, 3, early_stopping="never"), deadline=deadline)
        async with aclosing(search.run()) as outputs:
            for _ in range(4):
                await anext(outputs)
            deadline.set()
            (end,) = [output async for output in outputs]
        assert [delta.index for delta in end.deltas] == [0, 1]
        assert score(request, 1.0, end.deltas[0]) >= score(request, 1.0, end.deltas[1])
        for delta in end.deltas:
            assert (len(delta.token_ids) == 3) or delta.finish_reason is FinishReason.STOP
            assert len(delta.logprobs) == len(delta.token_ids)
            seen.add(delta.finish_reason)
    assert seen == {FinishReason.STOP, FinishReason.DEADLINE}


async def test_empty_choices_rank_last_at_the_deadline() -> None:
    deadline, engine = asyncio.Event(), TableEngine(lambda _: [math.log(0.5), math.log(0.5)], tokens=2)
    async with aclosing(
        BeamSearch(engine, request_with(max_tokens=9), BeamSearchParams(3, 4), deadline=deadline).run()
    ) as outputs:
        for _ in range(2):
            await anext(outputs)
        deadline.set()
        (end,) = [output async for output in outputs]
    assert [len(delta.token_ids) for delta in end.deltas] == [1, 1, 0]


class Gate:
    """Blocks the requests with a certain number of generated tokens until `opened` is set.

    `all_waiting` is set once the expected number of requests wait.
    """

    def __init__(self, tokens: int, requests: int) -> None:
        self.length = len(PROMPT) + tokens
        self.missing = requests
        self.all_waiting = asyncio.Event()
        self.opened = asyncio.Event()

    async def __call__(self, request: EngineRequest) -> None:
        if len(request.prompt) == self.length:
            self.missing -= 1
            if not self.missing:
                self.all_waiting.set()
            await self.opened.wait()


AT_EACH_STAGE = pytest.mark.parametrize(("tokens", "requests"), [(0, 1), (1, 3), (3, 3)])


@AT_EACH_STAGE
async def test_a_cancelled_search_frees_every_engine_request(tokens: int, requests: int) -> None:
    engine = TableEngine(random_table(0, tokens=5), tokens=5)
    engine.before = gate = Gate(tokens, requests)
    task = asyncio.create_task(all_outputs(BeamSearch(engine, request_with(ignore_eos=True), BeamSearchParams(2, 3))))
    await gate.all_waiting.wait()
    assert engine.running == requests
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.running == 0


@AT_EACH_STAGE
async def test_at_the_deadline_choices_have_the_tokens_of_all_complete_steps(tokens: int, requests: int) -> None:
    engine = TableEngine(random_table(0, tokens=5), tokens=5)
    engine.before = gate = Gate(tokens, requests)
    search = BeamSearch(engine, request_with(ignore_eos=True), BeamSearchParams(2, 3), deadline=gate.opened)
    task = asyncio.create_task(all_outputs(search))
    await gate.all_waiting.wait()
    gate.opened.set()
    *_, end = await task
    assert [len(delta.token_ids) for delta in end.deltas] == [tokens] * 2
    assert engine.running == 0


@pytest.mark.parametrize("consumed", [1, 2, 4])
async def test_a_closed_search_leaves_no_engine_request(consumed: int) -> None:
    engine = TableEngine(random_table(0, tokens=5), tokens=5)
    outputs = BeamSearch(engine, request_with(), BeamSearchParams(2, 3)).run()
    for _ in range(consumed):
        await anext(outputs)
    await outputs.aclose()
    assert engine.running == 0


@pytest.mark.parametrize("error", [UnavailableError("lost"), KeyError("bug")], ids=["service", "internal"])
async def test_an_error_of_one_beam_ends_the_others_and_is_raised_unchanged(error: Exception) -> None:
    engine, cause = TableEngine(random_table(0, tokens=5), tokens=5), ValueError("why")
    gate = Gate(tokens=1, requests=2)

    async def before(request: EngineRequest) -> None:
        if len(request.prompt) == gate.length and not gate.missing:
            raise error from cause
        await gate(request)

    engine.before = before
    with pytest.raises(type(error)) as raised:
        await all_outputs(BeamSearch(engine, request_with(ignore_eos=True), BeamSearchParams(2, 3)))
    assert (raised.value, raised.value.__cause__) == (error, cause)
    assert engine.running == 0


@pytest.mark.timeout(60)
async def test_a_beam_that_a_full_engine_rejects_is_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "RETRY_SECONDS", 0)
    request, beam = request_with(ignore_eos=True), BeamSearchParams(2, 3)
    expected = await choices_of(TableEngine(random_table(0, tokens=5), tokens=5), request, beam)
    engine, rejections = TableEngine(random_table(0, tokens=5), tokens=5), 0

    async def before(request: EngineRequest) -> None:
        nonlocal rejections
        if len(request.prompt) > len(PROMPT) and engine.running > 1:
            rejections += 1
            raise OverloadedError("full")

    engine.before = before
    assert await choices_of(engine, request, beam) == expected
    assert rejections > 0


async def test_searches_share_the_permits_for_beams_and_for_requests() -> None:
    request, beam, limits = request_with(ignore_eos=True), BeamSearchParams(2, 3), BeamLimits(beams=6, requests=2)
    engine = TableEngine(random_table(0, tokens=5), tokens=5)
    expected = await choices_of(engine, request, beam)
    running, most = Counter[str](), Counter[str]()

    async def before(request: EngineRequest) -> None:
        kind = "first" if len(request.prompt) == len(PROMPT) else "later"
        running[kind] += 1
        most[kind] = max(most[kind], running[kind])
        for _ in range(5):
            await asyncio.sleep(0)
        running[kind] -= 1

    engine.before = before
    searches = [BeamSearch(engine, request, beam, limits) for _ in range(8)]
    outputs = await asyncio.gather(*map(all_outputs, searches))
    assert [list(search[-1].deltas) for search in outputs] == [expected] * 8
    assert most == {"first": 2, "later": 2}


async def test_a_search_that_waits_for_permits_ends_at_its_deadline() -> None:
    limits, deadline = BeamLimits(beams=3), asyncio.Event()
    engine = TableEngine(random_table(0, tokens=5), tokens=5)
    async with limits.beams.hold(3):
        search = BeamSearch(engine, request_with(), BeamSearchParams(2, 3), limits, deadline=deadline)
        task = asyncio.create_task(all_outputs(search))
        await asyncio.sleep(0)
        assert not engine.requests
        deadline.set()
        (*_, end) = await task
    assert [delta.finish_reason for delta in end.deltas] == [FinishReason.DEADLINE] * 2
    assert await limits.beams.acquire(3) == 3


async def test_a_cancelled_search_that_waits_for_permits_takes_none() -> None:
    limits = BeamLimits(beams=3)
    async with limits.beams.hold(3):
        search = BeamSearch(
            TableEngine(random_table(0, tokens=5), tokens=5), request_with(), BeamSearchParams(2, 3), limits
        )
        task = asyncio.create_task(all_outputs(search))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
    assert await limits.beams.acquire(3) == 3


async def test_a_rejected_beam_waits_longer_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    delays: list[tuple[float, float]] = []

    def no_delay(low: float, high: float) -> float:
        delays.append((low, high))
        return 0

    monkeypatch.setattr(backoff, "uniform", no_delay)
    engine = TableEngine(random_table(0, tokens=5), tokens=5)

    async def before(request: EngineRequest) -> None:
        if len(request.prompt) > len(PROMPT) and len(delays) < 8:
            raise OverloadedError("full")

    engine.before = before
    await all_outputs(BeamSearch(engine, request_with(ignore_eos=True), BeamSearchParams(1, 1)))
    assert delays[:3] == [(0.025, 0.05), (0.05, 0.1), (0.1, 0.2)]
    assert delays[-1] == (1, 2)


async def test_a_search_whose_first_request_is_rejected_fails() -> None:
    async def before(request: EngineRequest) -> None:
        raise OverloadedError("full")

    engine = TableEngine(random_table(0, tokens=5), tokens=5)
    engine.before = before
    with pytest.raises(ServiceError, match="full"):
        await all_outputs(BeamSearch(engine, request_with(), BeamSearchParams(2, 3)))
    assert engine.running == 0


@pytest.mark.timeout(60)
async def test_scores_decrease_and_no_text_is_repeated() -> None:
    for seed in SEEDS:
        request = request_with(max_tokens=8)
        deltas = await choices_of(
            TableEngine(random_table(seed, tokens=6), tokens=6), request, BeamSearchParams(4, 4, 0.7)
        )
        assert len({delta.token_ids for delta in deltas}) == 4
        assert all(score(request, 0.7, one) >= score(request, 0.7, other) for one, other in pairwise(deltas))


@pytest.mark.timeout(60)
async def test_on_the_reference_model_the_choices_equal_those_of_transformers(demo: Path) -> None:
    from hf_search import HfYuan, Search, hf_choices, our_choices, rare_tokens  # takes six seconds
    from reference import ReferenceYuan

    from yuan_grpc.model.tokenizer import YuanTokenizer

    tokenizer = YuanTokenizer.from_pretrained(demo)
    model = HfYuan(reference := ReferenceYuan(demo, len(tokenizer)))
    engine = TableEngine(
        lambda ids: reference.logprobs(list(ids))[-1].tolist(), len(tokenizer), texts=["?"] * len(tokenizer)
    )
    prompt = tokenizer.encode("世界上最高的山是什么")
    ends = rare_tokens(model, prompt, width=8)
    for early_stopping in (True, False):
        search = Search(prompt, 8, ends, early_stopping)
        ours, theirs = await our_choices(engine, search), hf_choices(model, search)
        assert [list(delta.token_ids) for delta in ours] == [token_ids for token_ids, _ in theirs]
        logprobs = [logprob for _, logprob in theirs]
        assert [delta.cumulative_logprob for delta in ours] == pytest.approx(logprobs, abs=1e-4)
