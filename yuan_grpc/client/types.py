"""Response types: frozen Python values, built from protobuf messages or from the deltas of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from yuan_grpc.client.errors import broken_response_error
from yuan_grpc.request.fields import MAX_CHOICES
from yuan_grpc.v1 import yuan_pb2 as pb

if TYPE_CHECKING:
    from yuan_grpc.client.errors import YuanError
    from yuan_grpc.client.requests import Prompt


@dataclass(frozen=True)
class TopLogprob:
    """The log-probability of a candidate token."""

    token_id: int
    token: str
    logprob: float
    rank: int


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a token, with the most likely tokens at its position."""

    token_id: int
    token: str
    logprob: float
    rank: int
    top: tuple[TopLogprob, ...]


@dataclass(frozen=True)
class Choice:
    """One of the `n` continuations.

    Attributes:
        index: 0-based index.
        text: the generated text, preceded by the prompt if `echo` was set.
        token_ids: the generated tokens, including the one that ended the choice.
        finish_reason: `stop`, `length`, `repetition` or `deadline`; None while the choice is unfinished.
        stop_string: the stop string that ended the choice; None if something else did.
        stop_token_id: the stop token or end-of-text token that ended the choice; None if something else did.
        cumulative_logprob: the sum of the log-probabilities, if they were requested or used for ranking.
        logprobs: one entry per token, if requested. With `flat_logprobs` they are in `Completion.message` instead.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    stop_string: str | None
    stop_token_id: int | None
    cumulative_logprob: float | None
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class Usage:
    """Token counts: the prompt, the completion over all choices, and the prompt tokens found in the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Timings:
    """The times of a request on the server, in seconds; None if unknown.

    Attributes:
        queue: time that the request waited for the engine.
        prefill: time from the end of `queue` to the first token.
        first_token: time from the arrival of the request to its first token.
        decode: time from the first token to the last.
        total: time from the arrival of the request to its last token.
    """

    queue: float | None
    prefill: float | None
    first_token: float | None
    decode: float | None
    total: float | None


@dataclass(frozen=True)
class Completion:
    """The response to one request.

    Attributes:
        choices: the continuations, ordered by index.
        usage: token counts.
        seed: the sampling seed; None for deterministic requests.
        request_id: the request id.
        model: the name of the served model or LoRA adapter.
        prompt_token_ids: the prompt as the model received it, if requested.
        prompt_logprobs: one entry per prompt token, if requested.
        message: the protobuf message with all fields.
        timings: the times of the request, if requested.
    """

    choices: tuple[Choice, ...]
    usage: Usage
    seed: int | None
    request_id: str
    model: str
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]
    message: pb.GenerateResponse = field(repr=False, compare=False)
    timings: Timings | None = None

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text if self.choices else ""


@dataclass(frozen=True)
class Result:
    """The outcome of one request of `generate_many`: either a completion or an error.

    Attributes:
        index: 0-based position of the prompt in the input.
        prompt: the prompt from the input.
        completion: None if the request failed.
        error: None if the request succeeded.
    """

    index: int
    prompt: Prompt
    completion: Completion | None
    error: YuanError | None

    @property
    def text(self) -> str:
        """The first choice's text.

        Raises:
            YuanError: the request failed.
        """
        if self.completion is None:
            assert self.error is not None
            raise self.error
        return self.completion.text


@dataclass(frozen=True)
class Token:
    """A token, its piece in the vocabulary, and its character offsets in the text, the end exclusive."""

    id: int
    piece: str
    start: int
    end: int


@dataclass(frozen=True)
class Sizes:
    """The dimensions of a model."""

    layers: int
    hidden: int
    heads: int
    intermediate: int
    tokens: int


@dataclass(frozen=True)
class Limits:
    """The server's limits on requests; `max_num_queued_reqs` is None if the queue is unbounded."""

    max_model_len: int
    max_logprobs: int
    max_choices: int
    max_num_seqs: int
    max_num_queued_reqs: int | None
    priority_scheduling: bool
    prefix_caching: bool


@dataclass(frozen=True)
class Parallelism:
    """The model's parallel sizes."""

    tensor: int
    pipeline: int
    data: int


@dataclass(frozen=True)
class LoraSupport:
    """The LoRA limits of the server and the names of the loaded adapters."""

    max_loras: int
    max_lora_rank: int
    can_load: bool
    loaded: tuple[str, ...]


@dataclass(frozen=True)
class Model:
    """The served model, its configuration and its limits. `lora` is None if LoRA is disabled."""

    name: str
    revision: str
    version: str
    vllm_version: str
    dtype: str
    quantization: str
    sizes: Sizes
    limits: Limits
    parallelism: Parallelism
    lora: LoraSupport | None


@dataclass(frozen=True)
class Loras:
    """The names of the loaded adapters and of those the server can load."""

    loaded: tuple[str, ...]
    available: tuple[str, ...]


def completion_of_call(message: pb.GenerateResponse, request_id: str) -> Completion:
    """Convert the response to a successful call.

    Raises:
        InternalError: the response does not have all of its choices.
    """
    check_choices(message.choices, request_id or message.request_id)
    return completion_from_proto(message)


def check_choices(choices: Sequence[pb.Choice], request_id: str) -> None:
    """Raise InternalError unless the choices are those of a finished call: at least one, in order, each finished."""
    if not choices:
        raise broken_response_error("has no choices", request_id)
    if len(choices) > MAX_CHOICES:
        raise broken_response_error(f"has {len(choices)} choices, more than {MAX_CHOICES}", request_id)
    indexes = [choice.index for choice in choices]
    if indexes != list(range(len(choices))):
        raise broken_response_error(f"has choices with the wrong indexes: {indexes}", request_id)
    for choice in choices:
        if choice.finish_reason == pb.FINISH_REASON_UNSPECIFIED:
            raise broken_response_error(f"ends before choice {choice.index} is finished", request_id)


def completion_from_proto(message: pb.GenerateResponse) -> Completion:
    """Convert a `GenerateResponse`, complete or not."""
    return Completion(
        choices=tuple(_choice(choice) for choice in message.choices),
        usage=_from_fields(Usage, message.usage),
        seed=_optional(message, "seed"),
        request_id=message.request_id,
        model=message.model,
        prompt_token_ids=tuple(message.prompt_token_ids),
        prompt_logprobs=_logprobs(message.prompt_logprobs),
        message=message,
        timings=_timings(message.timings) if message.HasField("timings") else None,
    )


def _timings(message: pb.Timings) -> Timings:
    names = [name for name in Timings.__dataclass_fields__ if message.HasField(name)]
    seconds = {name: getattr(message, name).ToTimedelta().total_seconds() for name in names}
    return Timings(**{name: seconds.get(name) for name in Timings.__dataclass_fields__})


def tokens_from_proto(message: pb.TokenizeResponse) -> list[Token]:
    """Convert a `TokenizeResponse`."""
    return [_from_fields(Token, token) for token in message.tokens]


def model_from_proto(message: pb.GetModelResponse) -> Model:
    """Convert a `GetModelResponse`."""
    has_lora = message.HasField("lora")
    model: Model = _from_fields(
        Model,
        message,
        sizes=_from_fields(Sizes, message.sizes),
        limits=_from_fields(
            Limits, message.limits, max_num_queued_reqs=_optional(message.limits, "max_num_queued_reqs")
        ),
        parallelism=_from_fields(Parallelism, message.parallelism),
        lora=_from_fields(LoraSupport, message.lora, loaded=tuple(message.lora.loaded)) if has_lora else None,
    )
    return model


def loras_from_proto(message: pb.ListLorasResponse) -> Loras:
    """Convert a `ListLorasResponse`."""
    return Loras(tuple(lora.name for lora in message.loras), tuple(message.available))


class CompletionBuilder:
    """An accumulator that merges the messages of a stream into the response Generate would return."""

    def __init__(self) -> None:
        self._response = pb.GenerateResponse()
        self._choices: dict[int, pb.Choice] = {}
        self._texts: dict[int, list[str]] = {}

    @property
    def request_id(self) -> str:
        """The request id; empty until the first message has arrived."""
        return self._response.request_id

    @property
    def text(self) -> str:
        """The first choice's text so far."""
        return "".join(self._texts.get(0, ()))

    def add(self, message: pb.GenerateStreamResponse) -> str:
        """Merge a message and return the text it adds to the first choice.

        Raises:
            InternalError: the index of a choice is out of range.
        """
        response = self._response
        response.request_id, response.model = message.request_id, message.model
        if message.HasField("usage"):
            response.usage.CopyFrom(message.usage)
        if message.HasField("timings"):
            response.timings.CopyFrom(message.timings)
        if message.HasField("seed"):
            response.seed = message.seed
        response.prompt_token_ids.extend(message.prompt_token_ids)
        response.prompt_logprobs.extend(message.prompt_logprobs)
        if message.HasField("flat_prompt_logprobs"):
            _extend_flat(response.flat_prompt_logprobs, message.flat_prompt_logprobs)
        for choice in message.choices:
            self._add_choice(choice)
        return "".join(choice.text for choice in message.choices if choice.index == 0)

    def build(self) -> Completion:
        """Return the completion so far, as a new object on each call."""
        response = pb.GenerateResponse()
        response.CopyFrom(self._response)
        for index in sorted(self._choices):
            response.choices.add().CopyFrom(self._choices[index])
            response.choices[-1].text = "".join(self._texts[index])
        return completion_from_proto(response)

    def check_complete(self, request_id: str) -> None:
        """Raise InternalError if the stream has ended without all of its choices."""
        check_choices([self._choices[index] for index in sorted(self._choices)], request_id)

    def _add_choice(self, delta: pb.Choice) -> None:
        if delta.index >= MAX_CHOICES:
            raise broken_response_error(f"has a choice with the wrong index: {delta.index}", self.request_id)
        choice = self._choices.setdefault(delta.index, pb.Choice(index=delta.index))
        self._texts.setdefault(delta.index, []).append(delta.text)
        if delta.HasField("flat_logprobs"):
            _extend_flat(choice.flat_logprobs, delta.flat_logprobs)
        mergeable = pb.Choice()
        mergeable.CopyFrom(delta)
        mergeable.ClearField("text")
        mergeable.ClearField("flat_logprobs")
        choice.MergeFrom(mergeable)  # appends to repeated fields, replaces the others


def _extend_flat(target: pb.FlatLogprobs, delta: pb.FlatLogprobs) -> None:
    offset = len(target.token_ids)
    target.token_ids.extend(delta.token_ids)
    target.logprobs.extend(delta.logprobs)
    target.ranks.extend(delta.ranks)
    target.starts.extend(offset + start for start in delta.starts)


def _choice(message: pb.Choice) -> Choice:
    return Choice(
        index=message.index,
        text=message.text,
        token_ids=tuple(message.token_ids),
        finish_reason=_finish_reason(message.finish_reason),
        stop_string=_optional(message, "stop_string"),
        stop_token_id=_optional(message, "stop_token_id"),
        cumulative_logprob=_optional(message, "cumulative_logprob"),
        logprobs=_logprobs(message.logprobs),
    )


def _finish_reason(number: int) -> str | None:
    if number == pb.FINISH_REASON_UNSPECIFIED:
        return None
    known = pb.FinishReason.DESCRIPTOR.values_by_number.get(number)
    return known.name.removeprefix("FINISH_REASON_").lower() if known else f"unknown ({number})"


def _logprobs(messages: Any) -> tuple[TokenLogprob, ...]:
    return tuple(
        _from_fields(TokenLogprob, message, top=tuple(_from_fields(TopLogprob, top) for top in message.top))
        for message in messages
    )


def _optional(message: Any, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None


def _from_fields(kind: Any, message: Any, **converted: Any) -> Any:
    """Build a dataclass from the message fields of the same names; `converted` overrides single fields."""
    names = kind.__dataclass_fields__
    return kind(**{name: converted[name] if name in converted else getattr(message, name) for name in names})
