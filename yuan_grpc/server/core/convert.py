"""Messages to plain values. Takes a request for right: `checks` has seen it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from yuan_grpc.server.engine.types import BeamSearchParams, Constraint, EngineRequest, ModelInfo, Repetition, Sampling
from yuan_grpc.v1 import yuan_pb2 as pb

_NUMBERS = (
    "n",
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "logprobs",
    "prompt_logprobs",
    "stream_interval",
    "skip_reading_prefix_cache",
)
"""Optional fields that are sampling parameters of the same name."""


@dataclass(frozen=True)
class RequestPlan:
    """A request, checked: what the engine is to do, and how it is answered.

    Attributes:
        job: with `n` choices to sample; with `beam` or `best_of`, what a search of its own makes of it.
        beam: beam search's parameters, or None.
        best_of: how many choices to sample, of which the job's `n` best are returned.
    """

    engine_request: EngineRequest
    beam: BeamSearchParams | None = None
    best_of: int = 1


def plan_request(request: pb.GenerateRequest, prompt: Sequence[int], info: ModelInfo) -> RequestPlan:
    """What the engine is to do, given the tokenized, truncated prompt."""
    sampling = sampling_of(request)
    n, width = sampling.n, width_of(request)
    if request.use_beam_search:
        sampling = replace(sampling, n=1, temperature=0.0, seed=None)
    engine_request = EngineRequest(
        request_id=request.request_id,
        prompt=prompt,
        sampling=sampling,
        priority=request.priority,
        cache_salt=request.cache_salt,
        lora="" if request.model == info.name else request.model,
    )
    if not request.use_beam_search:
        return RequestPlan(engine_request, best_of=width)
    length_penalty = request.length_penalty if request.HasField("length_penalty") else BeamSearchParams.length_penalty
    early_stopping = early_stopping_of(request) or False
    return RequestPlan(
        engine_request, BeamSearchParams(n=n, width=width, length_penalty=length_penalty, early_stopping=early_stopping)
    )


def sampling_of(request: pb.GenerateRequest) -> Sampling:
    """The sampling parameters of a request; those that a search replaces as they are."""
    given = {name: getattr(request, name) for name in _NUMBERS if request.HasField(name)}
    detection = request.repetition_detection
    return Sampling(
        **given,
        stop=tuple(request.stop),
        stop_token_ids=tuple(request.stop_token_ids),
        ignore_eos=request.ignore_eos,
        include_stop_str_in_output=request.include_stop_str_in_output,
        skip_special_tokens=skips_special_tokens(request),
        logprob_token_ids=tuple(request.logprob_token_ids),
        logit_bias=dict(request.logit_bias),
        allowed_token_ids=tuple(request.allowed_token_ids),
        bad_words=tuple(request.bad_words),
        repetition_detection=Repetition(detection.max_pattern_size, detection.min_pattern_size, detection.min_count)
        if request.HasField("repetition_detection")
        else None,
        structured_outputs=_constraint(request),
    )


def width_of(request: pb.GenerateRequest) -> int:
    """How many choices are generated, of which `n` are returned."""
    return request.best_of if request.HasField("best_of") else num_choices(request)


def jobs_of(request: pb.GenerateRequest) -> int:
    """How many choices are computed to begin with. Beam search begins with one, and greedy choices are all alike."""
    width = width_of(request)
    return 1 if width > 1 and (request.use_beam_search or sampling_of(request).is_greedy) else width


def logprobs_beside(request: pb.GenerateRequest) -> int | None:
    """How many log-probabilities are asked for beside that of each generated token; None where none are."""
    if request.HasField("logprobs"):
        return request.logprobs
    return len(request.logprob_token_ids) or None


def num_choices(request: pb.GenerateRequest) -> int:
    """How many choices are returned."""
    return request.n if request.HasField("n") else Sampling.n


def max_tokens_of(request: pb.GenerateRequest) -> int:
    """The most tokens of a choice."""
    return request.max_tokens if request.HasField("max_tokens") else Sampling.max_tokens


def skips_special_tokens(request: pb.GenerateRequest) -> bool:
    """Whether the request's texts leave `<eod>` and its like out."""
    return request.skip_special_tokens if request.HasField("skip_special_tokens") else True


def early_stopping_of(request: pb.GenerateRequest) -> bool | Literal["never"] | None:
    """What is asked for, or None where it is none of the three."""
    value = request.early_stopping
    kind = value.WhichOneof("kind")
    if kind in (None, "null_value"):
        return False
    if kind == "bool_value":
        return value.bool_value
    return "never" if value.string_value == "never" else None


def heartbeat_seconds(request: pb.GenerateRequest) -> float | None:
    """After how many seconds without a message a stream sends an empty one; None for never."""
    interval = request.heartbeat_interval
    return interval.seconds + interval.nanos / 1e9 if request.HasField("heartbeat_interval") else None


def _constraint(request: pb.GenerateRequest) -> Constraint | None:
    outputs = request.structured_outputs
    kind = outputs.WhichOneof("constraint")
    if kind is None:
        return None
    return Constraint(kind, tuple(outputs.choice.values) if kind == "choice" else getattr(outputs, kind))


def truncated(request: pb.GenerateRequest, prompt: Sequence[int], info: ModelInfo) -> Sequence[int]:
    """The prompt, cut as `truncate_prompt_tokens` says. A malformed value cuts nothing: it is complained of later."""
    most = request.truncate_prompt_tokens
    if most == -1:
        most = info.max_model_len - max(1, max_tokens_of(request))
    if most < 1 or len(prompt) <= most:
        return prompt
    return prompt[:most] if request.truncation_side == pb.TRUNCATION_SIDE_RIGHT else prompt[-most:]
