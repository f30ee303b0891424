"""What OpenAI's two calls share of a body: fields that mean nothing here, and those that are written otherwise."""

from collections.abc import Mapping, Sequence
from typing import Any

from yuan_grpc.server.core.validation import reject
from yuan_grpc.server.errors import InvalidRequestError
from yuan_grpc.server.http.call import HttpCall
from yuan_grpc.server.http.errors import renamed
from yuan_grpc.server.http.json_body import as_json, fill, flag, written_as_ours
from yuan_grpc.v1 import yuan_pb2 as pb

_WITHOUT_EFFECT = (
    *("user", "store", "metadata", "service_tier", "safety_identifier", "prediction", "parallel_tool_calls"),
    *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
    *("session_id", "add_special_tokens", "include_reasoning"),  # vLLM's
)
"""Fields that change no text, or none of Yuan's."""

_NEUTRAL: Mapping[str, Sequence[Any]] = {
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}
"""Fields that would change the text in a way that is not supported, and the values that do not."""

_NOT_HERE = ("prompt_token_ids", "flat_logprobs", "return_prompt_token_ids")
"""Fields of ours that have another name in OpenAI's calls, or whose answers have no place there."""


def take_shared(fields: dict[str, Any]) -> tuple[bool, bool]:
    """Takes out of a body what both calls have and our messages have not, and rewrites the rest as those have it.

    Returns:
        Whether the answer is streamed, and whether the stream has the usage.

    Raises:
        InvalidRequestError: a field asks for what is not supported.
    """
    for name in _WITHOUT_EFFECT:
        fields.pop(name, None)
    for name, values in _NEUTRAL.items():
        if name in fields and fields.pop(name) not in values:
            reject(name, f"`{name}` must be absent: it is not supported here")
    for name in _NOT_HERE:
        if name in fields:
            reject(name, f"`{name}` must not be given: it is unknown or not supported here")
    _take_response_format(fields)
    written_as_ours(fields)
    fields["return_prompt_token_ids"] = flag(fields, "return_token_ids")
    stream = flag(fields, "stream")
    return stream, _take_stream_options(fields, stream)


def _take_stream_options(fields: dict[str, Any], stream: bool) -> bool:
    if "stream_options" not in fields:
        return False
    options = fields.pop("stream_options")
    if not isinstance(options, dict) or not stream:
        reject("stream_options", "`stream_options` must be an object, and absent without `stream`")
    options = {name: value for name, value in options.items() if value is not None}
    options.pop("include_obfuscation", None)
    has_usage = flag(options, "include_usage")
    for name in options:
        reject(f"stream_options.{name:.64}", f"`stream_options.{name:.64}` must not be given: it is unknown")
    return has_usage


def _take_response_format(fields: dict[str, Any]) -> None:
    if "response_format" not in fields:
        return
    wanted = fields.pop("response_format")
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if kind == "text":
        return
    if "structured_outputs" in fields:
        reject("response_format", "`response_format` must not be given together with `structured_outputs`")
    if kind == "json_object":
        fields["structured_outputs"] = {"json_object": True}
        return
    schema = wanted.get("json_schema") if kind == "json_schema" else None
    if not isinstance(schema, dict) or not isinstance(schema.get("schema"), dict):
        reject("response_format", "`response_format` must be of type text, json_object or json_schema with a `schema`")
    fields["structured_outputs"] = {"json": as_json("response_format", schema["schema"])}


def filled(fields: dict[str, Any], call: HttpCall, names: Mapping[str, str]) -> tuple[pb.GenerateRequest, str]:
    """A request without its prompt, and the model as the caller calls it."""
    request = pb.GenerateRequest()
    try:
        fill(request, fields)
    except InvalidRequestError as error:
        raise renamed(error, names) from None
    model = request.model
    if model in call.state.aliases:
        request.model = ""
    return request, model
