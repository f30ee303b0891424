"""Request conversion: Python values to protobuf messages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypedDict

from google.protobuf.duration_pb2 import Duration
from google.protobuf.struct_pb2 import Value

from yuan_grpc.client.errors import InvalidRequestError, unencodable_value_error
from yuan_grpc.client.metadata import MetadataLike
from yuan_grpc.request.notation import to_json_text, to_list, to_truncation_side
from yuan_grpc.v1 import yuan_pb2 as pb

MessageLike = pb.Message | tuple[str, str] | Mapping[str, str]
"""A message of a conversation: a `Message`, a (role, content) pair, or a dict with both keys."""

Prompt = str | Sequence[int] | Sequence[MessageLike] | pb.GenerateRequest
"""A prompt: text, token ids, a conversation, or a complete request."""


class Parameters(TypedDict, total=False):
    """Generation parameters: the fields of `GenerateRequest` (docs/reference/api.md), and the call options.

    None is the same as leaving the parameter out.
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
    return_timings: bool | None
    # The fields of `structured_outputs`.
    json: str | Mapping[str, Any] | None
    json_object: bool | None
    regex: str | None
    choice: Sequence[str] | None
    grammar: str | None
    structural_tag: str | Mapping[str, Any] | None
    # Call options, not sent in the request.
    timeout: float | None
    metadata: MetadataLike | None


CALL_OPTIONS = ("timeout", "metadata")
"""Parameters that configure the call instead of the request."""

_CONSTRAINTS = tuple(pb.StructuredOutputs.DESCRIPTOR.fields_by_name)


def generate_request(prompt: Prompt, parameters: Mapping[str, Any]) -> pb.GenerateRequest:
    """Convert a prompt and generation parameters; call options are ignored.

    Raises:
        TypeError: a parameter is unknown, or a value has the wrong type.
        InvalidRequestError: a value cannot be encoded: a number is out of range, or a text is not valid Unicode.
    """
    check_parameter_names(parameters)
    request = pb.GenerateRequest()
    try:
        set_prompt(request, prompt)
        for name, value in parameters.items():
            if value is not None and name not in CALL_OPTIONS:
                _fill(name, _set_field, request, name, value)
    except InvalidRequestError as error:
        raise error.with_request_id(parameters.get("request_id") or request.request_id) from error.__cause__
    return request


def tokenize_request(prompt: str | Iterable[MessageLike]) -> pb.TokenizeRequest:
    """Convert a text or a conversation.

    Raises:
        TypeError, InvalidRequestError: as for `generate_request`.
    """
    request = pb.TokenizeRequest()
    if isinstance(prompt, str):
        _fill("prompt", setattr, request, "prompt", prompt)
    else:
        _fill("messages", request.messages.extend, map(_message, prompt))
    return request


def detokenize_request(token_ids: Iterable[int], skip_special_tokens: bool) -> pb.DetokenizeRequest:
    """Convert token ids.

    Raises:
        TypeError, InvalidRequestError: as for `generate_request`.
    """
    request = pb.DetokenizeRequest(skip_special_tokens=skip_special_tokens)
    _fill("token_ids", request.token_ids.extend, token_ids)
    return request


def check_parameter_names(names: Iterable[str]) -> None:
    """Raise TypeError for a name that is not in `Parameters`."""
    for name in names:
        if name not in Parameters.__annotations__:
            raise TypeError(f"`{name}` is not a generation parameter; see yuan_grpc.client.Parameters")


def set_prompt(request: pb.GenerateRequest, prompt: Any) -> None:
    """Set the prompt of a request, in whichever form it is given."""
    if isinstance(prompt, pb.GenerateRequest):
        request.CopyFrom(prompt)
    elif isinstance(prompt, str):
        _fill("prompt", setattr, request, "prompt", prompt)
    elif isinstance(prompt, (bytes, Mapping)) or not isinstance(prompt, Iterable):
        raise TypeError(f"`prompt` must be text, token ids, a conversation or a request, not {type(prompt).__name__}")
    elif _is_conversation(items := list(prompt)):
        _fill("messages", request.messages.extend, map(_message, items))
    else:
        request.prompt_token_ids.SetInParent()
        _fill("prompt_token_ids", request.prompt_token_ids.ids.extend, items)


def _is_conversation(items: list[Any]) -> bool:
    return any(isinstance(item, (str, pb.Message, Mapping, tuple, list)) for item in items)


def _message(value: Any) -> pb.Message:
    if isinstance(value, pb.Message):
        return value
    if isinstance(value, Mapping):
        return pb.Message(**value)
    if isinstance(value, (tuple, list)) and len(value) == 2:
        return pb.Message(role=value[0], content=value[1])
    raise TypeError(f"a message must be a Message, a (role, content) pair or a dict with both, not {value!r:.80}")


def _fill(field: str, setter: Callable[..., Any], *arguments: Any) -> Any:
    """Call a setter; name the field in the error if it fails."""
    try:
        return setter(*arguments)
    except TypeError as error:
        raise TypeError(f"`{field}`: {error}") from error
    except ValueError as error:
        raise unencodable_value_error(field, error) from error


def _set_field(request: pb.GenerateRequest, name: str, value: Any) -> None:
    if name in _CONSTRAINTS:
        _set_constraint(request.structured_outputs, name, value)
        return
    field: Any = pb.GenerateRequest.DESCRIPTOR.fields_by_name[name]
    value = _CONVERSIONS[name](value) if name in _CONVERSIONS else value
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
        constraint.choice.values.extend(to_list(value))
    else:
        setattr(constraint, name, to_json_text(value))


def _early_stopping(value: bool | str) -> Value:
    return Value(bool_value=value) if isinstance(value, bool) else Value(string_value=value)


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def _truncation_side(side: str | int) -> int:
    return pb.TruncationSide.Value(to_truncation_side(side)) if isinstance(side, str) else side


def _repetition_detection(value: pb.RepetitionDetection | Mapping[str, int]) -> pb.RepetitionDetection:
    return value if isinstance(value, pb.RepetitionDetection) else pb.RepetitionDetection(**value)


_CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "stop": to_list,
    "bad_words": to_list,
    "early_stopping": _early_stopping,
    "heartbeat_interval": _duration,
    "truncation_side": _truncation_side,
    "repetition_detection": _repetition_detection,
}
