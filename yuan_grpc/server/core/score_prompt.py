"""Log-probabilities of a prompt, without generated tokens."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from yuan_grpc.server.engine.protocol import Engine
from yuan_grpc.server.engine.types import ChoiceDelta, EngineRequest, FinishReason, Sampling, StepOutput


async def score_prompt(
    engine: Engine, request: EngineRequest, choices: int, *, deadline: asyncio.Event | None = None
) -> AsyncGenerator[StepOutput, None]:
    """Yield the outputs of a request with `max_tokens` 0, and at the end its choices without tokens.

    vLLM generates at least one token. It is dropped, so all parameters of sampling have no effect.

    Args:
        engine: the engine to run it on.
        request: the request.
        choices: number of choices.
        deadline: see `Engine.generate`.
    """
    sampling = Sampling(
        max_tokens=1,
        temperature=0,
        prompt_logprobs=request.sampling.prompt_logprobs,
        skip_reading_prefix_cache=request.sampling.skip_reading_prefix_cache,
    )
    finish_reason = FinishReason.LENGTH
    async with aclosing(
        engine.generate(replace(request, sampling=sampling), stream=False, deadline=deadline)
    ) as outputs:
        async for output in outputs:
            if any(delta.finish_reason is FinishReason.DEADLINE for delta in output.deltas):
                finish_reason = FinishReason.DEADLINE
            yield replace(output, deltas=())
    yield StepOutput([ChoiceDelta(index, "", (), finish_reason=finish_reason) for index in range(choices)])
