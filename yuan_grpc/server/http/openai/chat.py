"""`/v1/chat/completions`: OpenAI's chat API, with Yuan's chat template."""

from collections.abc import Sequence
from typing import Any

from yuan_grpc.server.core.validation import reject
from yuan_grpc.server.engine.types import Sampling
from yuan_grpc.server.http.call import HttpCall
from yuan_grpc.server.http.json_body import pop_bool
from yuan_grpc.server.http.openai.conversation import pop_conversation
from yuan_grpc.server.http.openai.params import build_request, pop_options
from yuan_grpc.server.http.openai.streaming import OpenAIRequest, finish_reason, send_response
from yuan_grpc.server.http.openai.tokens import Prompt, TokenTexts, finite_logprob
from yuan_grpc.v1 import yuan_pb2 as pb

_FIELD_NAMES = {"logprobs": "top_logprobs"}


async def create_chat_completion(call: HttpCall) -> None:
    """Respond with the assistant's next message."""
    await send_response(call, _parse(await call.read_json(), call), _ChatFormat)


def _parse(body: dict[str, Any], call: HttpCall) -> OpenAIRequest:
    fields = dict(body)
    conversation = pop_conversation(fields)
    options = pop_options(fields)
    for name in ("prompt", "echo"):
        if fields.pop(name, False):
            reject(name, f"`{name}` must not be given here: use /v1/completions")
    names = options.field_names | _FIELD_NAMES | _pop_max_tokens(fields, call)
    include_logprobs, top_logprobs = pop_bool(fields, "logprobs"), fields.pop("top_logprobs", None)
    if include_logprobs:
        fields["logprobs"] = top_logprobs or 0
    elif top_logprobs:
        reject("top_logprobs", "`top_logprobs` must be absent without `logprobs`")
    request, model = build_request(fields, call, names)
    if conversation.continued is None:
        request.messages.extend(conversation.messages)
    else:
        request.prompt = conversation.text(call.state.service.engine)
        names |= {"prompt": "messages"}
    return OpenAIRequest([request], model, options, [names])


def _pop_max_tokens(fields: dict[str, Any], call: HttpCall) -> dict[str, str]:
    """Set `max_tokens`; return its name in the body if that is another one."""
    max_tokens = fields.pop("max_completion_tokens", None)
    names = {} if max_tokens is None else {"max_tokens": "max_completion_tokens"}
    if max_tokens is None:
        max_tokens = fields.get("max_tokens")
    if max_tokens is None:  # by default the end of the context is the only limit
        max_tokens = call.state.service.engine.info.max_model_len
        if fields.get("truncate_prompt_tokens") == -1:  # leave as many tokens for the response as other methods do
            fields["truncate_prompt_tokens"] = max(1, max_tokens - Sampling.max_tokens)
    fields["max_tokens"] = max_tokens
    return names


class _ChatFormat:
    """Choices as assistant messages."""

    object_type = "chat.completion"
    chunk_object_type = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts

    def opening(self, index: int) -> dict[str, Any]:
        return self._choice(index, "delta", {"role": "assistant", "content": ""}, pb.Choice())

    def full(self, index: int, choice: pb.Choice, prompt: Prompt) -> dict[str, Any]:
        return self._choice(index, "message", {"role": "assistant", "content": choice.text, "refusal": None}, choice)

    def delta(self, index: int, choice: pb.Choice, prompt: Prompt) -> dict[str, Any]:
        return self._choice(index, "delta", {"content": choice.text}, choice)

    def _choice(self, index: int, key: str, message: dict[str, Any], choice: pb.Choice) -> dict[str, Any]:
        return {
            "index": index,
            key: message,
            "logprobs": self._logprobs(choice.logprobs) if choice.logprobs else None,
            "finish_reason": finish_reason(choice),
        }

    def _logprobs(self, tokens: Sequence[pb.TokenLogprob]) -> dict[str, Any]:
        content = [self._token(token) | {"top_logprobs": [self._token(top) for top in token.top]} for token in tokens]
        return {"content": content, "refusal": None}

    def _token(self, token: pb.TokenLogprob | pb.TopLogprob) -> dict[str, Any]:
        raw = self._texts.output_bytes(token.token_id)
        return {"token": self._texts.text(token.token_id), "logprob": finite_logprob(token), "bytes": list(raw)}
