"""Parameters that OpenAI's completions and chat have in common, and their conversion to `GenerateRequest`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from yuan_grpc.server.core.validation import reject
from yuan_grpc.server.engine.model_names import resolve_alias
from yuan_grpc.server.errors import InvalidRequestError
from yuan_grpc.server.http.call import HttpCall
from yuan_grpc.server.http.errors import rename_fields
from yuan_grpc.server.http.json_body import convert_vllm_notation, pop_bool, set_fields, to_json
from yuan_grpc.v1 import yuan_pb2 as pb

_IGNORED = (
    *("user", "store", "metadata", "service_tier", "safety_identifier", "prediction", "parallel_tool_calls"),
    *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "verbosity"),
    # Extensions of vLLM.
    *("session_id", "add_special_tokens", "include_reasoning", "chat_template_kwargs"),
    *("mm_processor_kwargs", "media_io_kwargs"),
)
"""Fields that are accepted and ignored: they cannot change the text that Yuan generates."""

_UNSUPPORTED: Mapping[str, Sequence[Any]] = {
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}
"""Fields whose effect is not supported, and the values that request no effect."""

_RESPONSE_FORMAT_NAMES = {
    "structured_outputs.json_object": "response_format",
    "structured_outputs.json": "response_format.json_schema.schema",
    "structured_outputs": "response_format",
}
"""The client's names of the constraint, if it is given as `response_format`."""

_NOT_EXPOSED = ("prompt_token_ids", "flat_logprobs", "return_prompt_token_ids", "return_timings")
"""Fields of `GenerateRequest` that have another name in OpenAI's API, or no counterpart in its responses."""


@dataclass(frozen=True)
class ResponseOptions:
    """How to respond.

    Attributes:
        stream: whether the response is streamed.
        include_usage: whether a stream ends with the token counts.
        continuous_usage: whether each chunk of a stream has the token counts so far.
        return_token_ids: whether choices have their token ids, and those of the prompt.
        tokens_as_ids: whether log-probabilities show a token by its id.
        field_names: names of fields in the body, by those in `GenerateRequest`.
    """

    stream: bool
    include_usage: bool
    continuous_usage: bool
    return_token_ids: bool
    tokens_as_ids: bool
    field_names: dict[str, str]


def pop_options(fields: dict[str, Any]) -> ResponseOptions:
    """Remove the fields that `GenerateRequest` does not have, and convert the others to its notation, in place.

    Raises:
        InvalidRequestError: a field requests an unsupported feature.
    """
    for name in _IGNORED:
        fields.pop(name, None)
    if fields.get("tool_choice") == "none":
        fields.pop("tools", None)
    for name, values in _UNSUPPORTED.items():
        if name in fields and fields.pop(name) not in values:
            reject(name, f"`{name}` must be absent: it is not supported here")
    for name in fields:
        if name.startswith("guided_"):
            reject(f"{name:.64}", f"`{name:.64}` must not be given: use `structured_outputs` or `response_format`")
    for name in _NOT_EXPOSED:
        if name in fields:
            reject(name, f"`{name}` must not be given: it is unknown or not supported here")
    if fields.get("seed") == -1:  # absence in other APIs
        del fields["seed"]
    names = _RESPONSE_FORMAT_NAMES if _convert_response_format(fields) else {}
    convert_vllm_notation(fields)
    return_token_ids = pop_bool(fields, "return_token_ids")
    fields["return_prompt_token_ids"] = return_token_ids
    tokens_as_ids, stream = pop_bool(fields, "return_tokens_as_token_ids"), pop_bool(fields, "stream")
    return ResponseOptions(stream, *_pop_usage_options(fields, stream), return_token_ids, tokens_as_ids, dict(names))


def _pop_usage_options(fields: dict[str, Any], stream: bool) -> tuple[bool, bool]:
    """Return whether a stream ends with the usage, and whether each chunk has it."""
    if "stream_options" not in fields:
        return False, False
    options = fields.pop("stream_options")
    if not isinstance(options, dict) or not stream:
        reject("stream_options", "`stream_options` must be an object, and absent without `stream`")
    options = {name: value for name, value in options.items() if value is not None}
    options.pop("include_obfuscation", None)
    try:
        usage_options = pop_bool(options, "include_usage"), pop_bool(options, "continuous_usage_stats")
    except InvalidRequestError as error:
        [violation] = error.violations
        field = f"stream_options.{violation.field}"
        reject(field, f"`{field}` must be true or false")
    for name in options:
        reject(f"stream_options.{name:.64}", f"`stream_options.{name:.64}` must not be given: it is unknown")
    return usage_options


def _convert_response_format(fields: dict[str, Any]) -> bool:
    """Convert `response_format` to `structured_outputs`; return whether it has a constraint."""
    if "response_format" not in fields:
        return False
    response_format = fields.pop("response_format")
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    if kind == "text":
        return False
    if "structured_outputs" in fields:
        reject("response_format", "`response_format` must be absent with `structured_outputs`")
    if kind == "json_object":
        fields["structured_outputs"] = {"json_object": True}
        return True
    schema = response_format.get("json_schema") if kind == "json_schema" else None
    if not isinstance(schema, dict) or not isinstance(schema.get("schema"), dict):
        reject("response_format", "`response_format` must be of type text, json_object or json_schema with a `schema`")
    fields["structured_outputs"] = {"json": to_json("response_format", schema["schema"])}
    return True


def build_request(fields: dict[str, Any], call: HttpCall, names: Mapping[str, str]) -> tuple[pb.GenerateRequest, str]:
    """Return a request without its prompt, and the model name that the client used.

    Args:
        fields: the fields of the request by the names of `GenerateRequest`.
        names: the client's field names, by prefix of the names in `GenerateRequest`, for errors.
    """
    request = pb.GenerateRequest()
    try:
        set_fields(request, fields)
    except InvalidRequestError as error:
        raise rename_fields(error, names) from None
    model = request.model
    request.model = resolve_alias(model, call.state.aliases)
    return request, model
