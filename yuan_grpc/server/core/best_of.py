"""How a request is run that is more than one job's choices. Beam search has a room of its own."""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import replace
from math import inf

from yuan_grpc.server.engine.protocol import Engine
from yuan_grpc.server.engine.types import ChoiceDelta, EngineRequest, Progress, StepOutput


class OutputAccumulator:
    """Puts the pieces of every choice together.

    Args:
        choices: how many there will be.
    """

    def __init__(self, choices: int) -> None:
        self._choices: list[list[ChoiceDelta]] = [[] for _ in range(choices)]
        self._rest = StepOutput()

    def add(self, output: StepOutput) -> None:
        """Appends what is new."""
        for delta in output.deltas:
            self._choices[delta.index].append(delta)
        self._rest = StepOutput(
            cached_tokens=output.cached_tokens or self._rest.cached_tokens,
            prompt_logprobs=output.prompt_logprobs or self._rest.prompt_logprobs,
            discarded_tokens=output.discarded_tokens + self._rest.discarded_tokens,
        )

    def whole(self) -> StepOutput:
        """All of every choice so far, as one step. A search may find fewer than were asked for."""
        return replace(self._rest, deltas=[_joined(deltas) for deltas in self._choices if deltas])


def _joined(deltas: Sequence[ChoiceDelta]) -> ChoiceDelta:
    if len(deltas) == 1:
        return deltas[0]
    summed = [delta.cumulative_logprob for delta in deltas if delta.cumulative_logprob is not None]
    return replace(
        deltas[-1],
        text="".join(delta.text for delta in deltas),
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
        logprobs=[token for delta in deltas for token in delta.logprobs],
        cumulative_logprob=summed[-1] if summed else None,
    )


async def replicate_choices(
    outputs: AsyncGenerator[StepOutput, None], choices: int
) -> AsyncGenerator[StepOutput, None]:
    """The steps of a job of one choice, for so many that can only be equal to it."""
    async with aclosing(outputs):
        async for output in outputs:
            yield replace(
                output, deltas=[replace(delta, index=index) for delta in output.deltas for index in range(choices)]
            )


async def best_of(
    engine: Engine, request: EngineRequest, choices: int, *, deadline: asyncio.Event | None = None
) -> AsyncGenerator[StepOutput, None]:
    """More choices than are asked for, of which those with the highest cumulative log-probability are returned.

    Args:
        engine: what generates.
        job: what is asked of it; `n` is how many choices are returned.
        choices: how many are sampled.
        cut: see `Engine.generate`; then they are the best of what there is.

    Yields:
        Progress, and at the end the best choices.
    """
    sampling = request.sampling
    keeps_logprobs = sampling.logprobs is not None or bool(sampling.logprob_token_ids)
    logprobs = sampling.logprobs if keeps_logprobs else 0  # without which nothing is summed up
    gathering, tokens, finished = OutputAccumulator(choices), 0, 0
    outputs = engine.generate(
        replace(request, sampling=replace(sampling, n=choices, logprobs=logprobs)),
        stream=True,
        deadline=deadline,
    )
    async with aclosing(outputs):
        async for output in outputs:
            gathering.add(output)
            tokens += _tokens(output.deltas)
            finished += sum(delta.finish_reason is not None for delta in output.deltas)
            yield replace(output, deltas=(), progress=Progress(tokens, finished) if output.deltas else None)
    whole = gathering.whole()
    best = sorted(whole.deltas, key=_likelihood, reverse=True)
    returned = [replace(delta, index=index) for index, delta in enumerate(best[: sampling.n])]
    if not keeps_logprobs:
        returned = [replace(delta, logprobs=()) for delta in returned]
    yield StepOutput(returned, cached_tokens=whole.cached_tokens, discarded_tokens=_tokens(best[sampling.n :]))


def _likelihood(delta: ChoiceDelta) -> float:
    """What has no token yet is no good."""
    return -inf if delta.cumulative_logprob is None or not delta.token_ids else delta.cumulative_logprob


def _tokens(deltas: Iterable[ChoiceDelta]) -> int:
    return sum(len(delta.token_ids) for delta in deltas)
