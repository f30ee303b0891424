"""`/v1/chat/completions`: OpenAI's chat API, with Yuan's chat template."""

from collections.abc import Sequence
from typing import Any

from yuan_grpc.server.core.limits import MAX_MESSAGES
from yuan_grpc.server.core.validation import reject
from yuan_grpc.server.engine.types import Sampling
from yuan_grpc.server.http.call import HttpCall
from yuan_grpc.server.http.json_body import pop_bool
from yuan_grpc.server.http.openai.params import build_request, constraint_names, pop_common_fields
from yuan_grpc.server.http.openai.streaming import OpenAIRequest, finish_reason, finite_logprob, send_response
from yuan_grpc.v1 import yuan_pb2 as pb

_FIELD_NAMES = {"logprobs": "top_logprobs"}
_ROLES = {"developer": "system"}
"""OpenAI roles and the roles they map to here."""


async def handle(call: HttpCall) -> None:
    """Respond with the assistant's next message."""
    await send_response(call, _parse(await call.read_json(), call), _ChatFormat())


def _parse(body: dict[str, Any], call: HttpCall) -> OpenAIRequest:
    fields = dict(body)
    stream, include_usage = pop_common_fields(fields)
    names = _FIELD_NAMES | constraint_names(body)
    for name in ("prompt", "echo"):
        if fields.pop(name, False):
            reject(name, f"`{name}` must not be given here: use /v1/completions")
    messages = _messages(fields.pop("messages", None))
    max_tokens = fields.pop("max_completion_tokens", None)
    if max_tokens is not None:
        names |= {"max_tokens": "max_completion_tokens"}
    else:
        max_tokens = fields.get("max_tokens")
    if max_tokens is None:  # by default the end of the context is the only limit
        max_tokens = call.state.service.engine.info.max_model_len
        if fields.get("truncate_prompt_tokens") == -1:  # leave as many tokens for the response as other methods do
            fields["truncate_prompt_tokens"] = max(1, max_tokens - Sampling.max_tokens)
    include_logprobs, top_logprobs = pop_bool(fields, "logprobs"), fields.pop("top_logprobs", None)
    if include_logprobs:
        fields["logprobs"] = top_logprobs or 0
    elif top_logprobs:
        reject("top_logprobs", "`top_logprobs` must be absent without `logprobs`")
    request, model = build_request(fields | {"max_tokens": max_tokens}, call, names)
    request.messages.extend(messages)
    return OpenAIRequest([request], model, stream, include_usage, names)


def _messages(messages: Any) -> list[pb.Message]:
    if not messages or not isinstance(messages, list):
        reject("messages", "`messages` must be a list of at least one message")
    if len(messages) > MAX_MESSAGES:
        reject("messages", f"`messages` must have at most {MAX_MESSAGES} messages, not {len(messages)}")
    return [_message(f"messages[{index}]", message) for index, message in enumerate(messages)]


def _message(field: str, message: Any) -> pb.Message:
    if not isinstance(message, dict) or not isinstance(role := message.get("role"), str):
        reject(field, f"`{field}` must be an object with a `role`")
    for name in ("tool_calls", "function_call", "audio", "tool_call_id"):
        if message.get(name):
            reject(f"{field}.{name}", f"`{field}.{name}` must be absent: it is not supported here")
    return pb.Message(role=_ROLES.get(role, role), content=_content(f"{field}.content", message.get("content")))


def _content(field: str, content: Any) -> str:
    """Return the content's text. Like vLLM, join several parts with line breaks."""
    parts = [content] if isinstance(content, str) else content
    if not isinstance(parts, list) or not parts:
        reject(field, f"`{field}` must be a string, or a list of text parts")
    return "\n".join(_part_text(f"{field}[{index}]", part) for index, part in enumerate(parts))


def _part_text(field: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        reject(field, f"`{field}` must be a part of type text")
    return text


class _ChatFormat:
    """Choices as assistant messages."""

    object_type = "chat.completion"
    chunk_object_type = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def opening(self, index: int) -> dict[str, Any]:
        return self._choice(index, "delta", {"role": "assistant", "content": ""}, pb.Choice())

    def full(self, index: int, choice: pb.Choice, prompt: Sequence[pb.TokenLogprob]) -> dict[str, Any]:
        return self._choice(index, "message", {"role": "assistant", "content": choice.text, "refusal": None}, choice)

    def delta(self, index: int, choice: pb.Choice, prompt: Sequence[pb.TokenLogprob]) -> dict[str, Any]:
        return self._choice(index, "delta", {"content": choice.text}, choice)

    def _choice(self, index: int, key: str, message: dict[str, Any], choice: pb.Choice) -> dict[str, Any]:
        return {
            "index": index,
            key: message,
            "logprobs": _logprobs(choice.logprobs) if choice.logprobs else None,
            "finish_reason": finish_reason(choice),
        }


def _logprobs(tokens: Sequence[pb.TokenLogprob]) -> dict[str, Any]:
    return {
        "content": [_token(token) | {"top_logprobs": [_token(top) for top in token.top]} for token in tokens],
        "refusal": None,
    }


def _token(token: pb.TokenLogprob | pb.TopLogprob) -> dict[str, Any]:
    return {"token": token.token, "logprob": finite_logprob(token), "bytes": list(token.token.encode())}
