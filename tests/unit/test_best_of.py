"""Accumulation of outputs, replicated choices, and best-of sampling."""

import asyncio
from collections.abc import AsyncGenerator

import pytest
from fake_engine import FakeEngine, last, more

from yuan_grpc.server.core.best_of import OutputAccumulator, best_of, replicate_choices
from yuan_grpc.server.engine.types import (
    ChoiceDelta,
    EngineRequest,
    FinishReason,
    Progress,
    RankedToken,
    Sampling,
    StepOutput,
    TokenLogprobs,
)

TOKEN = RankedToken(65, "A", -1.0, 1)


async def all_of(outputs: AsyncGenerator[StepOutput, None]) -> list[StepOutput]:
    return [output async for output in outputs]


def request(**fields: int) -> EngineRequest:
    return EngineRequest("id", [1], Sampling(**fields))  # type: ignore[arg-type]


def test_deltas_of_a_choice_are_joined() -> None:
    accumulator = OutputAccumulator(2)
    position = TokenLogprobs(TOKEN, ())
    accumulator.add(StepOutput())
    accumulator.add(
        StepOutput([ChoiceDelta(1, "a", [1], [position], -1.0)], cached_tokens=3, prompt_logprobs=[position])
    )
    accumulator.add(
        StepOutput([ChoiceDelta(1, "b", [2], [position], -2.0, FinishReason.STOP, "x"), ChoiceDelta(0, "c", [3])])
    )
    combined = accumulator.combined()
    assert combined.deltas == [
        ChoiceDelta(0, "c", [3]),
        ChoiceDelta(1, "ab", [1, 2], [position] * 2, -2.0, FinishReason.STOP, "x"),
    ]
    assert (combined.cached_tokens, combined.prompt_logprobs) == (3, [position])


async def test_identical_choices_are_computed_once() -> None:
    engine = FakeEngine(more("a"), last("b", 0))
    received = await all_of(replicate_choices(engine.generate(request(), stream=True), 2))
    assert [[(delta.index, delta.text) for delta in output.deltas] for output in received] == [
        [],
        [(0, "a"), (1, "a")],
        [(0, "b"), (1, "b")],
    ]


async def test_the_best_choices_are_yielded_in_order_at_the_end() -> None:
    engine = FakeEngine(last("bad", 0, -9.0), last("good", 1, -1.0), last("fair", 2, -5.0))
    *progress, end = await all_of(best_of(engine, request(n=2), 3))
    assert [(delta.index, delta.text) for delta in end.deltas] == [(0, "good"), (1, "fair")]
    assert end.discarded_tokens == 3
    assert [output.progress for output in progress] == [None, Progress(3, 1), Progress(7, 2), Progress(11, 3)]
    assert not any(output.deltas for output in progress)
    assert (engine.requests[0].sampling.n, engine.requests[0].sampling.logprobs) == (3, 0)


@pytest.mark.parametrize(("logprobs", "returned"), [(None, 0), (0, 1)])
async def test_logprobs_are_returned_only_on_request(logprobs: int | None, returned: int) -> None:
    delta = ChoiceDelta(0, "A", [65], [TokenLogprobs(TOKEN, ())], -1.0, FinishReason.LENGTH)
    sampling = Sampling(n=1, logprobs=logprobs)
    *_, end = await all_of(best_of(FakeEngine(StepOutput([delta])), EngineRequest("id", [1], sampling), 2))
    assert len(end.deltas[0].logprobs) == returned


async def test_at_the_deadline_the_best_choices_so_far_are_returned() -> None:
    deadline = asyncio.Event()
    deadline.set()
    engine = FakeEngine(more("a", 0), StepOutput([ChoiceDelta(1, "b", [2], cumulative_logprob=-1.0)]), hangs=True)
    *_, end = await all_of(best_of(engine, request(n=2), 3, deadline=deadline))
    assert [(delta.text, delta.finish_reason) for delta in end.deltas] == [
        ("b", FinishReason.DEADLINE),
        ("a", FinishReason.DEADLINE),
    ]


async def test_an_empty_choice_ranks_last() -> None:
    empty = StepOutput([ChoiceDelta(0, "", (), cumulative_logprob=0.0, finish_reason=FinishReason.DEADLINE)])
    *_, end = await all_of(best_of(FakeEngine(empty, last("b", 1, -9.0)), request(n=1), 2))
    assert [delta.text for delta in end.deltas] == ["b"]
