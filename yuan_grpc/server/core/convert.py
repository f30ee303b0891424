"""Conversion of generate requests from protobuf to plain values.

Nothing here rejects a value; `validation` checks the result.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from yuan_grpc.request.fields import FIELDS
from yuan_grpc.server.engine.protocol import Engine
from yuan_grpc.server.engine.types import Constraint, ModelInfo, Repetition, Sampling
from yuan_grpc.v1 import yuan_pb2 as pb

_SAMPLING_FIELDS = tuple(field.name for field in FIELDS if field.is_sampling)
_DESCRIPTORS: Any = pb.GenerateRequest.DESCRIPTOR.fields_by_name


@dataclass(frozen=True)
class ParsedRequest:
    """A generate request whose prompt is tokenized and whose sampling parameters are converted, not yet validated.

    Attributes:
        request: the message.
        prompt: the prompt's token ids, after truncation.
        prompt_text: the text of `prompt`; None if it was given as token ids or has been truncated.
        sampling: the sampling parameters as requested.
    """

    request: pb.GenerateRequest
    prompt: Sequence[int]
    prompt_text: str | None
    sampling: Sampling

    @property
    def best_of(self) -> int:
        """Number of choices to generate, of which the best `n` are returned; the width of a beam search."""
        return num_candidates(self.request)

    @property
    def sequences(self) -> int:
        """Number of sequences the engine starts with: one for a beam search, and one for identical choices."""
        return num_sequences(self.request)

    @property
    def top_logprobs(self) -> int | None:
        """Number of log-probabilities to return per generated token, not counting its own; None for none at all."""
        if self.sampling.logprobs is not None:
            return self.sampling.logprobs
        return len(self.sampling.logprob_token_ids) or None


async def parse_request(request: pb.GenerateRequest, engine: Engine) -> ParsedRequest:
    """Tokenize and truncate a request's prompt, and convert its sampling parameters."""
    sampling, text = to_sampling(request), None
    token_ids: Sequence[int] = request.prompt_token_ids.ids
    if not token_ids:
        text = _prompt_text(request, engine)
        token_ids = await engine.tokenize(text)
    prompt = list(truncate_prompt(request, token_ids, sampling.max_tokens, engine.info))
    return ParsedRequest(request, prompt, text if len(prompt) == len(token_ids) else None, sampling)


def _prompt_text(request: pb.GenerateRequest, engine: Engine) -> str:
    if request.messages and request.WhichOneof("input") is None:
        return engine.apply_chat_template([message.content for message in request.messages])
    return request.prompt


def truncate_prompt(
    request: pb.GenerateRequest, token_ids: Sequence[int], max_tokens: int, info: ModelInfo
) -> Sequence[int]:
    """Return the prompt truncated to `truncate_prompt_tokens`, or unchanged if that is absent or invalid.

    Args:
        max_tokens: the tokens of context to leave for a choice if `truncate_prompt_tokens` is -1.
    """
    limit = request.truncate_prompt_tokens
    if limit == -1:
        limit = info.max_model_len - max(1, max_tokens)
    if limit < 1 or len(token_ids) <= limit:
        return token_ids
    return token_ids[:limit] if request.truncation_side == pb.TRUNCATION_SIDE_RIGHT else token_ids[-limit:]


def to_sampling(request: pb.GenerateRequest) -> Sampling:
    """Return a request's sampling parameters, with defaults for absent fields."""
    values = {
        name: _plain_value(getattr(request, name))
        for name in _SAMPLING_FIELDS
        if not _DESCRIPTORS[name].has_presence or request.HasField(name)
    }
    return Sampling(**values, repetition_detection=_repetition(request), structured_outputs=_constraint(request))


def _plain_value(value: Any) -> Any:
    """Return a scalar unchanged, a repeated field as a tuple and a map as a dict."""
    if isinstance(value, int | float | str):
        return value
    return dict(value) if isinstance(value, Mapping) else tuple(value)


def _repetition(request: pb.GenerateRequest) -> Repetition | None:
    if not request.HasField("repetition_detection"):
        return None
    detection = request.repetition_detection
    return Repetition(detection.max_pattern_size, detection.min_pattern_size, detection.min_count)


def _constraint(request: pb.GenerateRequest) -> Constraint | None:
    constraint = request.structured_outputs
    kind = constraint.WhichOneof("constraint")
    if kind is None:
        return None
    return Constraint(kind, tuple(constraint.choice.values) if kind == "choice" else getattr(constraint, kind))


def num_choices(request: pb.GenerateRequest) -> int:
    """Return the number of choices in the response."""
    return request.n if request.HasField("n") else Sampling.n


def num_candidates(request: pb.GenerateRequest) -> int:
    """Return the number of choices to generate, of which the best `n` are returned; the width of a beam search."""
    return request.best_of if request.HasField("best_of") else num_choices(request)


def is_prompt_only(request: pb.GenerateRequest) -> bool:
    """Return whether no token is to be generated."""
    return request.HasField("max_tokens") and request.max_tokens == 0


def num_sequences(request: pb.GenerateRequest) -> int:
    """Return the number of sequences the engine starts with: one for a beam search or for identical choices."""
    candidates = num_candidates(request)
    are_identical = request.use_beam_search or is_prompt_only(request) or _is_greedy(request)
    return 1 if candidates > 1 and are_identical else candidates


def num_parallel(request: pb.GenerateRequest) -> int:
    """Return the number of sequences that the engine computes at a time for a request, counting beams."""
    has_beams = request.use_beam_search and not is_prompt_only(request)
    return num_candidates(request) if has_beams else num_sequences(request)


def _is_greedy(request: pb.GenerateRequest) -> bool:
    """Return whether the request is greedy, as `Sampling.is_greedy`, without converting its other fields."""
    values = {name: getattr(request, name) for name in ("temperature", "top_p", "top_k") if request.HasField(name)}
    return Sampling(**values).is_greedy


def early_stopping(request: pb.GenerateRequest) -> bool | Literal["never"] | None:
    """Return the requested `early_stopping`; None if it has none of the three values."""
    value = request.early_stopping
    kind = value.WhichOneof("kind")
    if kind in (None, "null_value"):
        return False
    if kind == "bool_value":
        return value.bool_value
    return "never" if value.string_value == "never" else None


def heartbeat_seconds(request: pb.GenerateRequest) -> float | None:
    """Return the silence after which a stream sends a heartbeat, in seconds; None for no heartbeats."""
    interval = request.heartbeat_interval
    return interval.seconds + interval.nanos / 1e9 if request.HasField("heartbeat_interval") else None
