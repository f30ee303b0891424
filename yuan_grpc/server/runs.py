"""How a request is run that is more than one job's choices. Beam search has a room of its own."""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import replace
from math import inf

from yuan_grpc.server.generation import Engine, Job, Piece, Progress, Step


class Gathering:
    """Puts the pieces of every choice together.

    Args:
        choices: how many there will be.
    """

    def __init__(self, choices: int) -> None:
        self._choices: list[list[Piece]] = [[] for _ in range(choices)]
        self._rest = Step()

    def add(self, step: Step) -> None:
        """Appends what is new."""
        for piece in step.pieces:
            self._choices[piece.index].append(piece)
        self._rest = Step(
            cached_tokens=step.cached_tokens or self._rest.cached_tokens,
            prompt_positions=step.prompt_positions or self._rest.prompt_positions,
            discarded_tokens=step.discarded_tokens + self._rest.discarded_tokens,
        )

    def whole(self) -> Step:
        """All of every choice so far, as one step. A search may find fewer than were asked for."""
        return replace(self._rest, pieces=[_joined(pieces) for pieces in self._choices if pieces])


def _joined(pieces: Sequence[Piece]) -> Piece:
    if len(pieces) == 1:
        return pieces[0]
    summed = [piece.cumulative_logprob for piece in pieces if piece.cumulative_logprob is not None]
    return replace(
        pieces[-1],
        text="".join(piece.text for piece in pieces),
        token_ids=[token_id for piece in pieces for token_id in piece.token_ids],
        positions=[position for piece in pieces for position in piece.positions],
        cumulative_logprob=summed[-1] if summed else None,
    )


async def alike(steps: AsyncGenerator[Step, None], choices: int) -> AsyncGenerator[Step, None]:
    """The steps of a job of one choice, for so many that can only be equal to it."""
    async with aclosing(steps):
        async for step in steps:
            yield replace(
                step, pieces=[replace(piece, index=index) for piece in step.pieces for index in range(choices)]
            )


async def best_of(
    engine: Engine, job: Job, choices: int, *, cut: asyncio.Event | None = None
) -> AsyncGenerator[Step, None]:
    """More choices than are asked for, of which those with the highest cumulative log-probability are returned.

    Args:
        engine: what generates.
        job: what is asked of it; `n` is how many choices are returned.
        choices: how many are sampled.
        cut: see `Engine.generate`; then they are the best of what there is.

    Yields:
        Progress, and at the end the best choices.
    """
    sampling = job.sampling
    keeps_positions = sampling.logprobs is not None or bool(sampling.logprob_token_ids)
    logprobs = sampling.logprobs if keeps_positions else 0  # without which nothing is summed up
    gathering, tokens, finished = Gathering(choices), 0, 0
    steps = engine.generate(
        replace(job, sampling=replace(sampling, n=choices, logprobs=logprobs)), stream=True, cut=cut
    )
    async with aclosing(steps):
        async for step in steps:
            gathering.add(step)
            tokens += _tokens(step.pieces)
            finished += sum(piece.finish_reason is not None for piece in step.pieces)
            yield replace(step, pieces=(), progress=Progress(tokens, finished) if step.pieces else None)
    whole = gathering.whole()
    best = sorted(whole.pieces, key=_likelihood, reverse=True)
    returned = [replace(piece, index=index) for index, piece in enumerate(best[: sampling.n])]
    if not keeps_positions:
        returned = [replace(piece, positions=()) for piece in returned]
    yield Step(returned, cached_tokens=whole.cached_tokens, discarded_tokens=_tokens(best[sampling.n :]))


def _likelihood(piece: Piece) -> float:
    """What has no token yet is no good."""
    return -inf if piece.cumulative_logprob is None or not piece.token_ids else piece.cumulative_logprob


def _tokens(pieces: Iterable[Piece]) -> int:
    return sum(len(piece.token_ids) for piece in pieces)
