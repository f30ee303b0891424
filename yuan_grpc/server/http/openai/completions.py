"""`/v1/completions`: OpenAI's completions API, for one or more prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

from yuan_grpc.server.core.validation import reject
from yuan_grpc.server.http.call import HttpCall
from yuan_grpc.server.http.json_body import to_token_ids
from yuan_grpc.server.http.openai.params import build_request, pop_options
from yuan_grpc.server.http.openai.streaming import OpenAIRequest, finish_reason, send_response
from yuan_grpc.server.http.openai.tokens import PRECEDING_TOKENS, Prompt, TextPosition, TokenTexts, finite_logprob
from yuan_grpc.v1 import yuan_pb2 as pb

MAX_PROMPTS = 1024
MAX_COPIED_BYTES = 2**26
"""Maximum size of the parameters, over the copies for each prompt."""


async def create_completion(call: HttpCall) -> None:
    """Respond with the choices of each prompt, in the order of the prompts."""
    await send_response(call, _parse(await call.read_json(), call), _CompletionFormat)


def _parse(body: dict[str, Any], call: HttpCall) -> OpenAIRequest:
    fields = dict(body)
    options = pop_options(fields)
    if "messages" in fields:
        reject("messages", "`messages` must not be given here: use /v1/chat/completions")
    prompts = _prompts(fields.pop("prompt", None))
    common, model = build_request(fields, call, options.field_names)
    names = dict(options.field_names)
    if common.HasField("logprobs"):
        common.return_prompt_token_ids = True  # to find the offsets of tokens in the text
        if common.echo:
            common.prompt_logprobs = common.logprobs
            names["prompt_logprobs"] = "logprobs"
    if (size := common.ByteSize()) * len(prompts) > MAX_COPIED_BYTES:
        reject("prompt", f"`prompt` must have fewer entries than {len(prompts)} with parameters of {size} bytes")
    requests = []
    for index, prompt in enumerate(prompts):
        requests.append(request := pb.GenerateRequest())
        request.CopyFrom(common)
        if len(prompts) > 1:
            request.request_id = f"{common.request_id}-{index}"
        if isinstance(prompt, str):
            request.prompt = prompt
        else:
            request.prompt_token_ids.CopyFrom(prompt)
    prompt_fields = [f"prompt[{index}]" for index in range(len(prompts))] if len(prompts) > 1 else ["prompt"]
    return OpenAIRequest(requests, model, options, [_with_prompt_names(names, field) for field in prompt_fields])


def _with_prompt_names(names: Mapping[str, str], field: str) -> Mapping[str, str]:
    return {**names, **dict.fromkeys(("prompt_token_ids.ids", "prompt_token_ids", "prompt"), field)}


def _prompts(prompts: Any) -> Sequence[str | pb.TokenIds]:
    if isinstance(prompts, str):
        return [prompts]
    if not prompts or not isinstance(prompts, list):
        reject("prompt", "`prompt` must be a string, a list of token ids, or a list of either")
    if isinstance(prompts[0], int):
        return [to_token_ids("prompt", prompts)]
    if len(prompts) > MAX_PROMPTS:
        reject("prompt", f"`prompt` must have at most {MAX_PROMPTS} entries, not {len(prompts)}")
    return [_prompt(f"prompt[{index}]", prompt) for index, prompt in enumerate(prompts)]


def _prompt(field: str, prompt: Any) -> str | pb.TokenIds:
    if isinstance(prompt, str):
        return prompt
    return to_token_ids(field, prompt if isinstance(prompt, list) else [None])


class _CompletionFormat:
    """Choices as texts. Keeps the offset in each text."""

    object_type = chunk_object_type = "text_completion"
    id_prefix = "cmpl-"

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._positions: dict[int, TextPosition] = {}
        self._lengths: dict[int, int] = {}

    def opening(self, index: int) -> None:
        """Return nothing: completions have no chunk before the first text."""

    def full(self, index: int, choice: pb.Choice, prompt: Prompt) -> dict[str, Any]:
        return self.delta(index, choice, prompt)

    def delta(self, index: int, choice: pb.Choice, prompt: Prompt) -> dict[str, Any]:
        self._lengths[index] = self._lengths.get(index, 0) + len(choice.text)
        tokens = [*prompt.logprobs, *choice.logprobs]
        return {
            "index": index,
            "text": choice.text,
            "logprobs": self._logprobs(tokens, self._text_offsets(index, choice, prompt)) if tokens else None,
            "finish_reason": finish_reason(choice),
        }

    def _text_offsets(self, index: int, choice: pb.Choice, prompt: Prompt) -> list[int]:
        """Return the offsets of the prompt's tokens and of the new ones in the text of a choice.

        Tokens after the end, such as those of a stop string, have the length of the text as their offset.
        """
        if (position := self._positions.get(index)) is None:
            self._positions[index] = position = TextPosition(prompt.echo_length)
            position.set_preceding_bytes(b"".join(map(self._texts.output_bytes, prompt.token_ids[-PRECEDING_TOKENS:])))
        offsets = [position.advance(self._texts.output_bytes(token.token_id)) for token in choice.logprobs]
        if choice.finish_reason:
            offsets = [min(offset, self._lengths[index]) for offset in offsets]
        return [*prompt.text_offsets, *offsets]

    def _logprobs(self, tokens: Sequence[pb.TokenLogprob], offsets: Sequence[int]) -> dict[str, Any]:
        with_logprob = [token if token.rank or token.top else None for token in tokens]  # a prompt's first has none
        return {
            "text_offset": offsets,
            "token_logprobs": [token and finite_logprob(token) for token in with_logprob],
            "tokens": [self._texts.text(token.token_id) for token in tokens],
            "top_logprobs": [token and self._top_logprobs(token) for token in with_logprob],
        }

    def _top_logprobs(self, token: pb.TokenLogprob) -> dict[str, float]:
        """Return log-probabilities by text. Of tokens with equal text, keep the most likely one."""
        logprobs: dict[str, float] = {}
        entries: Sequence[pb.TokenLogprob | pb.TopLogprob] = [token, *token.top]
        for entry in entries:
            text, logprob = self._texts.text(entry.token_id), finite_logprob(entry)
            logprobs[text] = max(logprob, logprobs.get(text, logprob))
        return logprobs
