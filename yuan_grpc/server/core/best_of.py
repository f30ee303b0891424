"""Best-of sampling, replicated greedy choices, and accumulation of outputs. Beam search has its own module."""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import replace
from math import inf

from yuan_grpc.server.engine.protocol import Engine
from yuan_grpc.server.engine.types import ChoiceDelta, EngineRequest, Progress, StepOutput


class OutputAccumulator:
    """Joins the deltas into complete choices.

    Args:
        choices: number of choices.
    """

    def __init__(self, choices: int) -> None:
        self._choices: list[list[ChoiceDelta]] = [[] for _ in range(choices)]
        self._output = StepOutput()

    def add(self, output: StepOutput) -> None:
        """Add the next output."""
        for delta in output.deltas:
            self._choices[delta.index].append(delta)
        self._output = StepOutput(
            cached_tokens=output.cached_tokens or self._output.cached_tokens,
            prompt_logprobs=output.prompt_logprobs or self._output.prompt_logprobs,
            discarded_tokens=output.discarded_tokens + self._output.discarded_tokens,
        )

    def combined(self) -> StepOutput:
        """Return one output with the complete choices so far. A search may have found fewer choices than requested."""
        return replace(self._output, deltas=[_joined(deltas) for deltas in self._choices if deltas])


def _joined(deltas: Sequence[ChoiceDelta]) -> ChoiceDelta:
    if len(deltas) == 1:
        return deltas[0]
    logprobs = [delta.cumulative_logprob for delta in deltas if delta.cumulative_logprob is not None]
    return replace(
        deltas[-1],
        text="".join(delta.text for delta in deltas),
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
        logprobs=[token for delta in deltas for token in delta.logprobs],
        cumulative_logprob=logprobs[-1] if logprobs else None,
    )


async def replicate_choices(
    outputs: AsyncGenerator[StepOutput, None], choices: int
) -> AsyncGenerator[StepOutput, None]:
    """Yield the outputs of a request with one choice, repeated for `choices` identical ones."""
    async with aclosing(outputs):
        async for output in outputs:
            yield replace(
                output, deltas=[replace(delta, index=index) for delta in output.deltas for index in range(choices)]
            )


async def best_of(
    engine: Engine, request: EngineRequest, choices: int, *, deadline: asyncio.Event | None = None
) -> AsyncGenerator[StepOutput, None]:
    """Sample more choices than requested, and return those with the highest cumulative log-probability.

    Args:
        engine: the engine to sample on.
        request: its `n` is the number of choices to return.
        choices: number of choices to sample.
        deadline: see `Engine.generate`; the result is then the best of the partial choices.

    Yields:
        Progress, and at the end the best choices.
    """
    sampling = request.sampling
    keeps_logprobs = sampling.logprobs is not None or bool(sampling.logprob_token_ids)
    logprobs = sampling.logprobs if keeps_logprobs else 0  # None gives no cumulative log-probability
    accumulator, tokens, finished = OutputAccumulator(choices), 0, 0
    outputs = engine.generate(
        replace(request, sampling=replace(sampling, n=choices, logprobs=logprobs)),
        stream=True,
        deadline=deadline,
    )
    async with aclosing(outputs):
        async for output in outputs:
            accumulator.add(output)
            tokens += _num_tokens(output.deltas)
            finished += sum(delta.finish_reason is not None for delta in output.deltas)
            yield replace(output, deltas=(), progress=Progress(tokens, finished) if output.deltas else None)
    combined = accumulator.combined()
    ranked = sorted(combined.deltas, key=_likelihood, reverse=True)
    best = [replace(delta, index=index) for index, delta in enumerate(ranked[: sampling.n])]
    if not keeps_logprobs:
        best = [replace(delta, logprobs=()) for delta in best]
    yield StepOutput(best, cached_tokens=combined.cached_tokens, discarded_tokens=_num_tokens(ranked[sampling.n :]))


def _likelihood(delta: ChoiceDelta) -> float:
    """Return the sort key of a choice; empty choices rank last."""
    return -inf if delta.cumulative_logprob is None or not delta.token_ids else delta.cumulative_logprob


def _num_tokens(deltas: Iterable[ChoiceDelta]) -> int:
    return sum(len(delta.token_ids) for delta in deltas)
