"""Answers: messages to frozen Python values, and the pieces of a stream to one of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from yuan_grpc.v1 import yuan_pb2 as pb

if TYPE_CHECKING:
    from yuan_grpc.client.errors import YuanError
    from yuan_grpc.client.requests import Prompt


@dataclass(frozen=True)
class TopLogprob:
    """The log-probability of a token that could have been chosen."""

    token_id: int
    token: str
    logprob: float
    rank: int


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a token, and of the most likely ones at its place."""

    token_id: int
    token: str
    logprob: float
    rank: int
    top: tuple[TopLogprob, ...]


@dataclass(frozen=True)
class Choice:
    """One of the continuations.

    Attributes:
        index: which one, from 0.
        text: what was generated, with the prompt in front where `echo` asked for it.
        token_ids: the generated tokens, the one that ended the choice included.
        finish_reason: `stop`, `length`, `repetition` or `deadline`; None for as long as it goes on.
        stop_string: the stop string that ended it; None if something else did.
        stop_token_id: the stop token, or the end-of-text token, that ended it; None if something else did.
        cumulative_logprob: the sum of its log-probabilities, where they were asked for or it was ranked by them.
        logprobs: of each token, where asked for. Those of `flat_logprobs` are in the answer's `message`.
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
    """Tokens counted: of the prompt, generated over all choices, and of the prompt those that a cache had."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Completion:
    """What was generated for one request.

    Attributes:
        choices: the continuations, in the order of their indices.
        usage: tokens counted.
        seed: what was sampled with; None where nothing was left to chance.
        request_id: the request's name.
        model: the served model's name, or the adapter's.
        prompt_token_ids: the prompt as the model saw it, where asked for.
        prompt_logprobs: of each token of the prompt, where asked for.
        message: the message that all this is of.
    """

    choices: tuple[Choice, ...]
    usage: Usage
    seed: int | None
    request_id: str
    model: str
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]
    message: pb.GenerateResponse = field(repr=False, compare=False)

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text if self.choices else ""


@dataclass(frozen=True)
class Result:
    """How one of many requests ended: with an answer or with an error.

    Attributes:
        index: the prompt's place among those given, from 0.
        prompt: what was given.
        answer: None if it failed.
        error: None if it did not.
    """

    index: int
    prompt: Prompt
    answer: Completion | None
    error: YuanError | None

    @property
    def text(self) -> str:
        """The first choice's text.

        Raises:
            YuanError: the request failed.
        """
        if self.answer is None:
            assert self.error is not None
            raise self.error
        return self.answer.text


@dataclass(frozen=True)
class Token:
    """A token, its piece in the vocabulary, and the stretch of text it stands for, in characters, the end exclusive."""

    id: int
    piece: str
    start: int
    end: int


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model."""

    layers: int
    hidden: int
    heads: int
    intermediate: int
    tokens: int


@dataclass(frozen=True)
class Limits:
    """What requests are held to; `max_num_queued_reqs` is None where any number may wait."""

    max_model_len: int
    max_logprobs: int
    max_choices: int
    max_num_seqs: int
    max_num_queued_reqs: int | None
    priority_scheduling: bool
    prefix_caching: bool


@dataclass(frozen=True)
class Parallelism:
    """How a model is spread over devices."""

    tensor: int
    pipeline: int
    data: int


@dataclass(frozen=True)
class LoraSupport:
    """LoRA, where it is enabled: its limits, and the names of the loaded adapters."""

    max_loras: int
    max_lora_rank: int
    can_load: bool
    loaded: tuple[str, ...]


@dataclass(frozen=True)
class Model:
    """What is served: on what, in which numbers, and its limits. `lora` is None where LoRA is not enabled."""

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
    """Names of adapters: those that are loaded, and those that the server could load."""

    loaded: tuple[str, ...]
    available: tuple[str, ...]


def answer_of(message: pb.GenerateResponse) -> Completion:
    """The answer that a message is."""
    return Completion(
        choices=tuple(_choice(choice) for choice in message.choices),
        usage=_plain(Usage, message.usage),
        seed=_given(message, "seed"),
        request_id=message.request_id,
        model=message.model,
        prompt_token_ids=tuple(message.prompt_token_ids),
        prompt_logprobs=_logprobs(message.prompt_logprobs),
        message=message,
    )


def tokens_of(message: pb.TokenizeResponse) -> list[Token]:
    """The tokens that a message has."""
    return [_plain(Token, token) for token in message.tokens]


def model_of(message: pb.GetModelResponse) -> Model:
    """The model that a message describes."""
    model: Model = _plain(
        Model,
        message,
        sizes=_plain(Sizes, message.sizes),
        limits=_plain(Limits, message.limits, max_num_queued_reqs=_given(message.limits, "max_num_queued_reqs")),
        parallelism=_plain(Parallelism, message.parallelism),
        lora=_plain(LoraSupport, message.lora, loaded=tuple(message.lora.loaded)) if message.HasField("lora") else None,
    )
    return model


def loras_of(message: pb.ListLorasResponse) -> Loras:
    """The adapters that a message lists."""
    return Loras(tuple(lora.name for lora in message.loras), tuple(message.available))


class Gathering:
    """Puts the pieces of a stream together, into what Generate would have answered."""

    def __init__(self) -> None:
        self._whole = pb.GenerateResponse()
        self._choices: dict[int, pb.Choice] = {}
        self._texts: dict[int, list[str]] = {}

    @property
    def request_id(self) -> str:
        """The request's name, once the first piece has told it; empty until then."""
        return self._whole.request_id

    @property
    def text(self) -> str:
        """The first choice's text so far."""
        return "".join(self._texts.get(0, ()))

    def add(self, part: pb.GenerateStreamResponse) -> str:
        """Takes a piece in, and returns what it adds to the first choice's text."""
        whole = self._whole
        whole.request_id, whole.model = part.request_id, part.model
        if part.HasField("usage"):
            whole.usage.CopyFrom(part.usage)
        if part.HasField("seed"):
            whole.seed = part.seed
        whole.prompt_token_ids.extend(part.prompt_token_ids)
        whole.prompt_logprobs.extend(part.prompt_logprobs)
        if part.HasField("flat_prompt_logprobs"):
            _extend_flat(whole.flat_prompt_logprobs, part.flat_prompt_logprobs)
        for choice in part.choices:
            self._add(choice)
        return "".join(choice.text for choice in part.choices if choice.index == 0)

    def answer(self) -> Completion:
        """All there is so far. Each call puts it together anew."""
        whole = pb.GenerateResponse()
        whole.CopyFrom(self._whole)
        for index in sorted(self._choices):
            whole.choices.add().CopyFrom(self._choices[index])
            whole.choices[-1].text = "".join(self._texts[index])
        return answer_of(whole)

    def _add(self, piece: pb.Choice) -> None:
        grown = self._choices.setdefault(piece.index, pb.Choice(index=piece.index))
        self._texts.setdefault(piece.index, []).append(piece.text)
        if piece.HasField("flat_logprobs"):
            _extend_flat(grown.flat_logprobs, piece.flat_logprobs)
        rest = pb.Choice()
        rest.CopyFrom(piece)
        rest.ClearField("text")
        rest.ClearField("flat_logprobs")
        grown.MergeFrom(rest)  # which appends to what is a list, and replaces what is not


def _extend_flat(grown: pb.FlatLogprobs, more: pb.FlatLogprobs) -> None:
    before = len(grown.token_ids)
    grown.token_ids.extend(more.token_ids)
    grown.logprobs.extend(more.logprobs)
    grown.ranks.extend(more.ranks)
    grown.starts.extend(before + start for start in more.starts)


def _choice(message: pb.Choice) -> Choice:
    return Choice(
        index=message.index,
        text=message.text,
        token_ids=tuple(message.token_ids),
        finish_reason=_finish_reason(message.finish_reason),
        stop_string=_given(message, "stop_string"),
        stop_token_id=_given(message, "stop_token_id"),
        cumulative_logprob=_given(message, "cumulative_logprob"),
        logprobs=_logprobs(message.logprobs),
    )


def _finish_reason(number: int) -> str | None:
    if number == pb.FINISH_REASON_UNSPECIFIED:
        return None
    known = pb.FinishReason.DESCRIPTOR.values_by_number.get(number)
    return known.name.removeprefix("FINISH_REASON_").lower() if known else f"unknown ({number})"


def _logprobs(messages: Any) -> tuple[TokenLogprob, ...]:
    return tuple(
        _plain(TokenLogprob, message, top=tuple(_plain(TopLogprob, top) for top in message.top)) for message in messages
    )


def _given(message: Any, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None


def _plain(kind: Any, message: Any, **converted: Any) -> Any:
    """A dataclass of a message's fields of the same names; `converted` has those that are not taken as they are."""
    names = kind.__dataclass_fields__
    return kind(**{name: converted[name] if name in converted else getattr(message, name) for name in names})
