"""Requests: Python values to messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypedDict

from google.protobuf.duration_pb2 import Duration
from google.protobuf.struct_pb2 import Value

from yuan_grpc.client.channel import MetadataLike
from yuan_grpc.client.errors import bad_value
from yuan_grpc.v1 import yuan_pb2 as pb

MessageLike = pb.Message | tuple[str, str] | Mapping[str, str]
"""What somebody says in a conversation: a message, a pair of role and content, or a dict of these two."""

Prompt = str | Sequence[int] | Sequence[MessageLike] | pb.GenerateRequest
"""What to continue: text, token ids, a conversation, or a ready request."""


class Parameters(TypedDict, total=False):
    """The keywords of a call that generates: the fields of `GenerateRequest`, whose comments say what each means.

    None stands for a keyword that is not given.
    """

    request_id: str | None
    n: int | None
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    include_stop_str_in_output: bool | None
    skip_special_tokens: bool | None
    logprobs: int | None
    echo: bool | None
    stream: bool | None
    use_beam_search: bool | None
    best_of: int | None
    length_penalty: float | None
    early_stopping: bool | str | None
    spaces_between_special_tokens: bool | None
    model: str | None
    truncate_prompt_tokens: int | None
    truncation_side: str | int | None
    min_tokens: int | None
    logit_bias: Mapping[int, float] | None
    allowed_token_ids: Sequence[int] | None
    bad_words: str | Sequence[str] | None
    repetition_detection: pb.RepetitionDetection | Mapping[str, int] | None
    stream_interval: int | None
    prompt_logprobs: int | None
    logprob_token_ids: Sequence[int] | None
    flat_logprobs: bool | None
    structured_outputs: pb.StructuredOutputs | None
    priority: int | None
    cache_salt: str | None
    skip_reading_prefix_cache: bool | None
    partial_on_deadline: bool | None
    heartbeat_interval: float | None
    return_prompt_token_ids: bool | None
    # The constraints of `structured_outputs`, by their own names.
    json: str | Mapping[str, Any] | None
    json_object: bool | None
    regex: str | None
    choice: Sequence[str] | None
    grammar: str | None
    structural_tag: str | Mapping[str, Any] | None
    # Of the call, and not of the request.
    timeout: float | None
    metadata: MetadataLike | None


OF_THE_CALL = ("timeout", "metadata")

_CONSTRAINTS = tuple(pb.StructuredOutputs.DESCRIPTOR.fields_by_name)
_PROMPTS = ("prompt", "prompt_token_ids", "messages")


def generate_request(prompt: Prompt, parameters: Mapping[str, Any]) -> pb.GenerateRequest:
    """The message of a prompt and keywords, those of the call left out.

    Raises:
        TypeError: a keyword is unknown, or a value is of a type that its field does not have.
        InvalidRequestError: a value cannot be sent: a number does not fit, or a text is not Unicode.
    """
    check_keywords(parameters)
    request = pb.GenerateRequest()
    with_prompt(request, prompt)
    for name, value in parameters.items():
        if value is not None and name not in OF_THE_CALL:
            _guarded(name, _set, request, name, value)
    return request


def tokenize_request(prompt: str | Iterable[MessageLike]) -> pb.TokenizeRequest:
    """The message of a text, or of a conversation.

    Raises:
        TypeError, InvalidRequestError: as `generate_request`.
    """
    request = pb.TokenizeRequest()
    if isinstance(prompt, str):
        _guarded("prompt", setattr, request, "prompt", prompt)
    else:
        _guarded("messages", request.messages.extend, map(_turn, prompt))
    return request


def detokenize_request(token_ids: Iterable[int], skip_special_tokens: bool) -> pb.DetokenizeRequest:
    """The message of token ids.

    Raises:
        TypeError, InvalidRequestError: as `generate_request`.
    """
    request = pb.DetokenizeRequest(skip_special_tokens=skip_special_tokens)
    _guarded("token_ids", request.token_ids.extend, token_ids)
    return request


def check_keywords(names: Iterable[str]) -> None:
    """Raises TypeError for a keyword that is none of `Parameters`."""
    for name in names:
        if name not in Parameters.__annotations__:
            raise TypeError(f"`{name}` is no keyword of a call that generates; see yuan_grpc.client.Parameters")


def with_prompt(request: pb.GenerateRequest, prompt: Any) -> None:
    """Puts a prompt of any kind into a request."""
    if isinstance(prompt, pb.GenerateRequest):
        request.CopyFrom(prompt)
    elif isinstance(prompt, str):
        _guarded("prompt", setattr, request, "prompt", prompt)
    elif isinstance(prompt, (bytes, Mapping)) or not isinstance(prompt, Iterable):
        raise TypeError(f"`prompt` must be text, token ids, a conversation or a request, not {type(prompt).__name__}")
    elif _is_conversation(items := list(prompt)):
        _guarded("messages", request.messages.extend, map(_turn, items))
    else:
        request.prompt_token_ids.SetInParent()
        _guarded("prompt_token_ids", request.prompt_token_ids.ids.extend, items)


def _is_conversation(items: list[Any]) -> bool:
    return any(isinstance(item, (str, pb.Message, Mapping, tuple, list)) for item in items)


def _turn(turn: Any) -> pb.Message:
    if isinstance(turn, pb.Message):
        return turn
    if isinstance(turn, Mapping):
        return pb.Message(**turn)
    if isinstance(turn, (tuple, list)) and len(turn) == 2:
        return pb.Message(role=turn[0], content=turn[1])
    raise TypeError(f"a turn must be a Message, a pair of role and content or a dict of them, not {turn!r:.80}")


def _guarded(field: str, do: Callable[..., Any], *arguments: Any) -> Any:
    """Does what fills a field, and names the field where that fails."""
    try:
        return do(*arguments)
    except TypeError as error:
        raise TypeError(f"`{field}`: {error}") from error
    except ValueError as error:
        raise bad_value(field, error) from error


def _set(request: pb.GenerateRequest, name: str, value: Any) -> None:
    if name in _CONSTRAINTS:
        _set_constraint(request.structured_outputs, name, value)
        return
    field: Any = pb.GenerateRequest.DESCRIPTOR.fields_by_name[name]
    value = _CONVERSIONS.get(name, _same)(value)
    request.ClearField(name)
    if name == "logit_bias":
        request.logit_bias.update(value)
    elif isinstance(getattr(request, name), Sequence) and not isinstance(getattr(request, name), str):
        getattr(request, name).extend(value)
    elif field.message_type is not None:
        getattr(request, name).CopyFrom(value)
    else:
        setattr(request, name, value)


def _set_constraint(constraint: pb.StructuredOutputs, name: str, value: Any) -> None:
    if name == "choice":
        constraint.choice.ClearField("values")
        constraint.choice.values.extend(_texts(value))
    elif isinstance(value, Mapping):
        setattr(constraint, name, json.dumps(value, ensure_ascii=False))
    else:
        setattr(constraint, name, value)


def _same(value: Any) -> Any:
    return value


def _texts(value: str | Iterable[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _early_stopping(value: bool | str) -> Value:
    return Value(bool_value=value) if isinstance(value, bool) else Value(string_value=value)


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def _side(side: str | int) -> int:
    return pb.TruncationSide.Value(f"TRUNCATION_SIDE_{side.upper()}") if isinstance(side, str) else side


def _repetition_detection(value: pb.RepetitionDetection | Mapping[str, int]) -> pb.RepetitionDetection:
    return value if isinstance(value, pb.RepetitionDetection) else pb.RepetitionDetection(**value)


_CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "stop": _texts,
    "bad_words": _texts,
    "early_stopping": _early_stopping,
    "heartbeat_interval": _duration,
    "truncation_side": _side,
    "repetition_detection": _repetition_detection,
}
