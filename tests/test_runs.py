"""Choices put together, and the best of several."""

import asyncio
from collections.abc import AsyncGenerator

import pytest
from fakes import FakeEngine, last, more

from yuan_grpc.server.generation import FinishReason, Job, Piece, Position, Progress, RankedToken, Sampling, Step
from yuan_grpc.server.runs import Gathering, alike, best_of

TOKEN = RankedToken(65, "A", -1.0, 1)


async def all_of(steps: AsyncGenerator[Step, None]) -> list[Step]:
    return [step async for step in steps]


def job(**fields: int) -> Job:
    return Job("id", [1], Sampling(**fields))  # type: ignore[arg-type]


def test_pieces_of_a_choice_are_put_together() -> None:
    gathering = Gathering(2)
    position = Position(TOKEN, ())
    gathering.add(Step())
    gathering.add(Step([Piece(1, "a", [1], [position], -1.0)], cached_tokens=3, prompt_positions=[position]))
    gathering.add(Step([Piece(1, "b", [2], [position], -2.0, FinishReason.STOP, "x"), Piece(0, "c", [3])]))
    whole = gathering.whole()
    assert whole.pieces == [
        Piece(0, "c", [3]),
        Piece(1, "ab", [1, 2], [position] * 2, -2.0, FinishReason.STOP, "x"),
    ]
    assert (whole.cached_tokens, whole.prompt_positions) == (3, [position])


async def test_choices_that_can_only_be_alike_are_computed_once() -> None:
    engine = FakeEngine(more("a"), last("b", 0))
    came = await all_of(alike(engine.generate(job(), stream=True), 2))
    assert [[(piece.index, piece.text) for piece in step.pieces] for step in came] == [
        [],
        [(0, "a"), (1, "a")],
        [(0, "b"), (1, "b")],
    ]


async def test_the_best_of_several_come_in_order_at_the_end() -> None:
    script = last("bad", 0, -9.0), last("good", 1, -1.0), last("fair", 2, -5.0)
    engine = FakeEngine(*script)
    *progress, end = await all_of(best_of(engine, job(n=2), 3))
    assert [(piece.index, piece.text) for piece in end.pieces] == [(0, "good"), (1, "fair")]
    assert end.discarded_tokens == 3
    assert [step.progress for step in progress] == [None, Progress(3, 1), Progress(7, 2), Progress(11, 3)]
    assert not any(step.pieces for step in progress)
    assert (engine.asked[0].sampling.n, engine.asked[0].sampling.logprobs) == (3, 0)


@pytest.mark.parametrize(("logprobs", "kept"), [(None, 0), (0, 1)])
async def test_logprobs_that_only_rank_are_not_returned(logprobs: int | None, kept: int) -> None:
    piece = Piece(0, "A", [65], [Position(TOKEN, ())], -1.0, FinishReason.LENGTH)
    sampling = Sampling(n=1, logprobs=logprobs)
    *_, end = await all_of(best_of(FakeEngine(Step([piece])), Job("id", [1], sampling), 2))
    assert len(end.pieces[0].positions) == kept


async def test_the_best_of_several_cut_short_are_the_best_so_far() -> None:
    cut = asyncio.Event()
    cut.set()
    engine = FakeEngine(more("a", 0), Step([Piece(1, "b", [2], cumulative_logprob=-1.0)]), hangs=True)
    *_, end = await all_of(best_of(engine, job(n=2), 3, cut=cut))
    assert [(piece.text, piece.finish_reason) for piece in end.pieces] == [
        ("b", FinishReason.DEADLINE),
        ("a", FinishReason.DEADLINE),
    ]


async def test_a_choice_without_a_token_is_no_good() -> None:
    empty = Step([Piece(0, "", (), cumulative_logprob=0.0, finish_reason=FinishReason.DEADLINE)])
    *_, end = await all_of(best_of(FakeEngine(empty, last("b", 1, -9.0)), job(n=1), 2))
    assert [piece.text for piece in end.pieces] == ["b"]
