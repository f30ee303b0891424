"""`/v1/chat/completions`: OpenAI's, for a conversation in Yuan's own format."""

from collections.abc import Sequence
from typing import Any

from yuan_grpc.server.core.limits import MAX_MESSAGES
from yuan_grpc.server.core.validation import reject
from yuan_grpc.server.http.call import HttpCall
from yuan_grpc.server.http.json_body import flag
from yuan_grpc.server.http.openai.params import filled, take_shared
from yuan_grpc.server.http.openai.streaming import OpenAIRequest, finish_reason, logprob_of, respond
from yuan_grpc.v1 import yuan_pb2 as pb

_NAMES = {"logprobs": "top_logprobs"}
_ROLES = {"developer": "system"}
"""Roles by other names."""


async def answer(call: HttpCall) -> None:
    """Answers with the assistant's next turn."""
    await respond(call, _parsed(await call.json(), call), _Turn())


def _parsed(body: dict[str, Any], call: HttpCall) -> OpenAIRequest:
    fields = dict(body)
    stream, has_usage = take_shared(fields)
    for name in ("prompt", "echo"):
        if fields.pop(name, False):
            reject(name, f"`{name}` must not be given here: it goes to /v1/completions")
    messages = _messages(fields.pop("messages", None))
    most = fields.pop("max_completion_tokens", None)
    names = _NAMES if most is None else _NAMES | {"max_tokens": "max_completion_tokens"}
    if most is None:  # what is left of the context, where a choice ends in any case
        most = fields.get("max_tokens", call.state.service.engine.info.max_model_len)
    wants_logprobs, top = flag(fields, "logprobs"), fields.pop("top_logprobs", None)
    if wants_logprobs:
        fields["logprobs"] = top or 0
    elif top:
        reject("top_logprobs", "`top_logprobs` must be absent without `logprobs`")
    request, model = filled(fields | {"max_tokens": most}, call, names)
    request.messages.extend(messages)
    return OpenAIRequest([request], model, stream, has_usage, names)


def _messages(given: Any) -> list[pb.Message]:
    if not given or not isinstance(given, list):
        reject("messages", "`messages` must be a list of at least one turn")
    if len(given) > MAX_MESSAGES:
        reject("messages", f"`messages` must have at most {MAX_MESSAGES} turns, not {len(given)}")
    return [_message(f"messages[{place}]", turn) for place, turn in enumerate(given)]


def _message(field: str, turn: Any) -> pb.Message:
    if not isinstance(turn, dict) or not isinstance(role := turn.get("role"), str):
        reject(field, f"`{field}` must be an object with a `role`")
    for name in ("tool_calls", "function_call", "audio", "tool_call_id"):
        if turn.get(name):
            reject(f"{field}.{name}", f"`{field}.{name}` must be absent: it is not supported here")
    return pb.Message(role=_ROLES.get(role, role), content=_content(f"{field}.content", turn.get("content")))


def _content(field: str, given: Any) -> str:
    """A text, or that of several parts, in lines of their own as vLLM puts them."""
    parts = [given] if isinstance(given, str) else given
    if not isinstance(parts, list) or not parts:
        reject(field, f"`{field}` must be a text, or a list of text parts")
    return "\n".join(_part(f"{field}[{place}]", part) for place, part in enumerate(parts))


def _part(field: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        reject(field, f"`{field}` must be a part of type text")
    return text


class _Turn:
    """Choices as turns of the assistant's."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prefix = "chatcmpl-"

    def opening(self, index: int) -> dict[str, Any]:
        return self._choice(index, "delta", {"role": "assistant", "content": ""}, pb.Choice())

    def whole(self, index: int, choice: pb.Choice, prompt: Sequence[pb.TokenLogprob]) -> dict[str, Any]:
        return self._choice(index, "message", {"role": "assistant", "content": choice.text, "refusal": None}, choice)

    def delta(self, index: int, choice: pb.Choice, prompt: Sequence[pb.TokenLogprob]) -> dict[str, Any]:
        return self._choice(index, "delta", {"content": choice.text}, choice)

    def _choice(self, index: int, key: str, turn: dict[str, Any], choice: pb.Choice) -> dict[str, Any]:
        return {
            "index": index,
            key: turn,
            "logprobs": _logprobs(choice.logprobs) if choice.logprobs else None,
            "finish_reason": finish_reason(choice),
        }


def _logprobs(tokens: Sequence[pb.TokenLogprob]) -> dict[str, Any]:
    return {
        "content": [_token(token) | {"top_logprobs": [_token(other) for other in token.top]} for token in tokens],
        "refusal": None,
    }


def _token(token: pb.TokenLogprob | pb.TopLogprob) -> dict[str, Any]:
    return {"token": token.token, "logprob": logprob_of(token), "bytes": list(token.token.encode())}
