"""`/tokenize`, `/detokenize` and `/tokenizer_info`, in vLLM's format."""

import asyncio
from typing import Any

from yuan_grpc.server.core import tokenization
from yuan_grpc.server.core.validation import reject
from yuan_grpc.server.engine.model_names import resolve_alias, resolve_lora
from yuan_grpc.server.http.call import AppState, HttpCall, encode_json
from yuan_grpc.server.http.errors import naming_fields
from yuan_grpc.server.http.json_body import pop_bool, to_token_ids
from yuan_grpc.server.http.openai.conversation import pop_conversation
from yuan_grpc.v1 import yuan_pb2 as pb

INLINE_TOKENS = 4096
"""Tokens to convert to JSON on the event loop, a few milliseconds of work; more are converted in a thread."""

_IGNORED = ("request_id", "add_special_tokens", "chat_template_kwargs", "mm_processor_kwargs", "media_io_kwargs")


async def tokenize(call: HttpCall) -> None:
    """Respond with the token ids of a text or of a conversation."""
    fields = await _read_fields(call)
    with_pieces = pop_bool(fields, "return_token_strs")
    request = pb.TokenizeRequest()
    if "messages" in fields:
        conversation = pop_conversation(fields)
        if conversation.continued is None:
            request.messages.extend(conversation.messages)
        else:
            request.prompt = conversation.text(call.state.service.engine)
    else:
        request.prompt = _pop_text(fields, "prompt")
    _reject_others(fields)
    response = await tokenization.tokenize(call.state.service, request)
    limit, is_small = call.state.service.engine.info.max_model_len, response.count <= INLINE_TOKENS

    def encode() -> bytes:
        content = {
            "count": response.count,
            "max_model_len": limit,
            "tokens": [token.id for token in response.tokens],
            "token_strs": [token.piece for token in response.tokens] if with_pieces else None,
        }
        return encode_json(content, in_loop=is_small).encode()

    await call.respond_encoded(encode() if is_small else await asyncio.to_thread(encode))


async def detokenize(call: HttpCall) -> None:
    """Respond with the text of token ids."""
    fields = await _read_fields(call)
    if not isinstance(tokens := fields.pop("tokens", None), list):
        reject("tokens", "`tokens` must be a list of token ids")
    _reject_others(fields)
    request = pb.DetokenizeRequest(token_ids=to_token_ids("tokens", tokens).ids)
    with naming_fields({"token_ids": "tokens"}):
        response = await tokenization.detokenize(call.state.service, request)
    await call.respond({"prompt": response.text})


def describe_tokenizer(state: AppState) -> dict[str, Any]:
    """Return the special tokens and the chat template."""
    engine = state.service.engine
    return {**engine.tokenizer_info, "model_max_length": engine.info.max_model_len}


async def _read_fields(call: HttpCall) -> dict[str, Any]:
    """Return the fields of the body without those that have no effect, and check its `model`."""
    fields = await call.read_json()
    for name in _IGNORED:
        fields.pop(name, None)
    engine = call.state.service.engine
    resolve_lora(resolve_alias(_pop_text(fields, "model"), call.state.aliases), engine.info.name, engine.loras)
    return fields


def _pop_text(fields: dict[str, Any], name: str) -> str:
    text = fields.pop(name, "" if name == "model" else None)
    if not isinstance(text, str):
        reject(name, f"`{name}` must be a string")
    return text


def _reject_others(fields: dict[str, Any]) -> None:
    for name in fields:
        reject(f"{name:.64}", f"`{name:.64}` must not be given: it is unknown or not supported here")
