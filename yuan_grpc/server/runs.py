"""How a request is run: sampled, or as the best of several. Beam search has a room of its own."""

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import replace
from math import inf

from yuan_grpc.server.generation import Engine, FinishReason, Job, Piece, Progress, Step


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


class Sampled:
    """The engine's own choices, just as they come.

    Args:
        engine: what generates.
        job: what is asked of it.
        stream: whether pieces are wanted as they come.
    """

    def __init__(self, engine: Engine, job: Job, *, stream: bool) -> None:
        self._engine = engine
        self._job = job
        self._stream = stream
        self._running = dict.fromkeys(range(job.sampling.n))

    def steps(self) -> AsyncGenerator[Step, None]:
        """What the engine yields."""
        return self._watched(self._engine.generate(self._job, stream=self._stream))

    async def _watched(self, steps: AsyncGenerator[Step, None]) -> AsyncGenerator[Step, None]:
        async with aclosing(steps):
            async for step in steps:
                for piece in step.pieces:
                    if piece.finish_reason:
                        self._running.pop(piece.index, None)
                yield step

    async def rest(self) -> Step:
        """An end for each choice that has none."""
        return Step([Piece(index, "", (), finish_reason=FinishReason.DEADLINE) for index in self._running])


class BestOf:
    """More choices than are asked for, of which those with the highest cumulative log-probability are returned.

    Args:
        engine: what generates.
        job: what is asked of it; `n` is how many choices are returned.
        best_of: how many are sampled.
    """

    def __init__(self, engine: Engine, job: Job, best_of: int) -> None:
        sampling = job.sampling
        self._n = sampling.n
        self._keeps_positions = sampling.logprobs is not None or bool(sampling.logprob_token_ids)
        logprobs = sampling.logprobs if self._keeps_positions else 0  # without which nothing is summed up
        self._all = Sampled(engine, replace(job, sampling=replace(sampling, n=best_of, logprobs=logprobs)), stream=True)
        self._gathering = Gathering(best_of)

    async def steps(self) -> AsyncGenerator[Step, None]:
        """Progress, and at the end the best choices."""
        tokens = finished = 0
        steps = self._all.steps()
        async with aclosing(steps):
            async for step in steps:
                self._gathering.add(step)
                tokens += sum(len(piece.token_ids) for piece in step.pieces)
                finished += sum(piece.finish_reason is not None for piece in step.pieces)
                yield replace(step, pieces=(), progress=Progress(tokens, finished) if step.pieces else None)
        yield self._best()

    async def rest(self) -> Step:
        """The best choices of what there is."""
        self._gathering.add(await self._all.rest())
        return self._best()

    def _best(self) -> Step:
        whole = self._gathering.whole()
        best = sorted(whole.pieces, key=_likelihood, reverse=True)
        return Step(
            [self._returned(index, piece) for index, piece in enumerate(best[: self._n])],
            cached_tokens=whole.cached_tokens,
            discarded_tokens=_tokens(best[self._n :]),
        )

    def _returned(self, index: int, piece: Piece) -> Piece:
        return replace(piece, index=index, positions=piece.positions if self._keeps_positions else ())


def _likelihood(piece: Piece) -> float:
    """What has no token yet is no good."""
    return -inf if piece.cumulative_logprob is None else piece.cumulative_logprob


def _tokens(pieces: Iterable[Piece]) -> int:
    return sum(len(piece.token_ids) for piece in pieces)
