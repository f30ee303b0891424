"""The plan of a validated request, and its execution on an engine."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, replace
from secrets import randbits
from uuid import uuid4

from yuan_grpc.server.core.beam_search import BeamSearch
from yuan_grpc.server.core.best_of import best_of, replicate_choices
from yuan_grpc.server.core.convert import ParsedRequest, early_stopping, heartbeat_seconds, is_prompt_only
from yuan_grpc.server.core.limits import BeamLimits
from yuan_grpc.server.core.score_prompt import score_prompt
from yuan_grpc.server.engine.model_names import resolve_lora
from yuan_grpc.server.engine.protocol import Engine
from yuan_grpc.server.engine.types import BeamSearchParams, EngineRequest, Sampling, StepOutput
from yuan_grpc.server.security.identity import current_identity

SEED_BITS = 48
"""Size of the seeds the server draws; every JSON parser reads such a number exactly."""


@dataclass(frozen=True)
class RequestPlan:
    """The engine request for a generate request, the strategy to run it, and the known parts of the response.

    Attributes:
        engine_request: has an `n` of 1 if a single sequence yields all choices.
        n: number of choices to return.
        best_of: number of choices to sample; if above `n`, the best `n` of them are returned.
        beam: parameters of the beam search; None to sample.
        model: the model's name in the response.
        echo: text that each choice begins with.
        heartbeat_seconds: silence after which a stream sends a heartbeat; None for no heartbeats.
    """

    engine_request: EngineRequest
    n: int
    best_of: int
    beam: BeamSearchParams | None
    model: str
    echo: str
    heartbeat_seconds: float | None


def plan_request(parsed: ParsedRequest, engine: Engine, trace_headers: Mapping[str, str] | None = None) -> RequestPlan:
    """Return the plan of a validated request. A sampled request without a seed gets one, so that it can be repeated.

    Raises:
        ModelNotFoundError: neither the served model nor a loaded adapter has the request's model name.
    """
    request, served = parsed.request, engine.info.name
    engine_request = EngineRequest(
        request_id=f"{request.request_id}-{uuid4().hex}",  # the same id may be running on another connection
        prompt=parsed.prompt,
        sampling=_engine_sampling(parsed),
        priority=request.priority,
        cache_salt=current_identity().cache_salt(request.cache_salt),
        lora=resolve_lora(request.model, served, engine.loras),
        trace_headers=trace_headers or {},
    )
    return RequestPlan(
        engine_request,
        n=parsed.sampling.n,
        best_of=parsed.best_of,
        beam=_beam_params(parsed) if request.use_beam_search else None,
        model=request.model or served,
        echo=_echo(parsed, engine),
        heartbeat_seconds=heartbeat_seconds(request),
    )


def _engine_sampling(parsed: ParsedRequest) -> Sampling:
    sampling = parsed.sampling
    if is_prompt_only(parsed.request):
        return replace(sampling, seed=None)
    if parsed.request.use_beam_search:
        return replace(sampling, n=1, temperature=0.0, seed=None)
    if sampling.is_greedy:  # all choices are identical
        return replace(sampling, n=1, seed=None)
    return sampling if sampling.seed is not None else replace(sampling, seed=randbits(SEED_BITS))


def _beam_params(parsed: ParsedRequest) -> BeamSearchParams:
    request = parsed.request
    return BeamSearchParams(
        n=parsed.sampling.n,
        width=parsed.best_of,
        length_penalty=request.length_penalty
        if request.HasField("length_penalty")
        else BeamSearchParams.length_penalty,
        early_stopping=early_stopping(request) or False,
    )


def _echo(parsed: ParsedRequest, engine: Engine) -> str:
    if not parsed.request.echo:
        return ""
    if parsed.prompt_text is not None:
        return parsed.prompt_text
    return engine.detokenize(parsed.prompt, skip_special_tokens=parsed.sampling.skip_special_tokens)


def run_plan(
    plan: RequestPlan, engine: Engine, beam_limits: BeamLimits, *, stream: bool, deadline: asyncio.Event | None
) -> AsyncGenerator[StepOutput, None]:
    """Return the outputs of a plan. The engine gets no request before they are iterated.

    Args:
        beam_limits: the limits on all beam searches.
        stream: whether the caller sends outputs as they come.
        deadline: see `Engine.generate`.
    """
    request = plan.engine_request
    if not request.sampling.max_tokens:
        return score_prompt(engine, request, plan.n, deadline=deadline)
    if plan.beam:
        return BeamSearch(engine, request, plan.beam, beam_limits, stream=stream, deadline=deadline).run()
    if plan.best_of > plan.n:
        return best_of(engine, request, plan.best_of, deadline=deadline)
    outputs = engine.generate(request, stream=stream, deadline=deadline)
    return outputs if request.sampling.n == plan.n else replicate_choices(outputs, plan.n)
