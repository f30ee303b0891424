"""`/v1/completions`: OpenAI's, for one prompt or many."""

from collections.abc import Sequence
from typing import Any

from yuan_grpc.server.core.validation import reject
from yuan_grpc.server.http.call import HttpCall
from yuan_grpc.server.http.json_body import token_ids
from yuan_grpc.server.http.openai.params import filled, take_shared
from yuan_grpc.server.http.openai.streaming import OpenAIRequest, finish_reason, logprob_of, respond
from yuan_grpc.v1 import yuan_pb2 as pb

MAX_PROMPTS = 1024
_NAMES = {"prompt_token_ids.ids": "prompt", "prompt_token_ids": "prompt"}


async def answer(call: HttpCall) -> None:
    """Answers with each prompt's choices, prompt by prompt."""
    await respond(call, _parsed(await call.json(), call), _Text())


def _parsed(body: dict[str, Any], call: HttpCall) -> OpenAIRequest:
    fields = dict(body)
    stream, has_usage = take_shared(fields)
    if "messages" in fields:
        reject("messages", "`messages` must not be given here: conversations go to /v1/chat/completions")
    prompts = _prompts(fields.pop("prompt", None))
    shared, model = filled(fields, call, {})
    if shared.echo and shared.HasField("logprobs"):
        shared.prompt_logprobs = shared.logprobs
    requests = []
    for place, prompt in enumerate(prompts):
        requests.append(request := pb.GenerateRequest())
        request.CopyFrom(shared)
        if len(prompts) > 1:
            request.request_id = f"{shared.request_id}-{place}"
        if isinstance(prompt, str):
            request.prompt = prompt
        else:
            request.prompt_token_ids.CopyFrom(prompt)
    return OpenAIRequest(requests, model, stream, has_usage, _NAMES)


def _prompts(given: Any) -> Sequence[str | pb.TokenIds]:
    if isinstance(given, str):
        return [given]
    if not given or not isinstance(given, list):
        reject("prompt", "`prompt` must be a text, a list of token ids, or a list of either")
    if isinstance(given[0], int):
        return [token_ids("prompt", given)]
    if len(given) > MAX_PROMPTS:
        reject("prompt", f"`prompt` must have at most {MAX_PROMPTS} entries, not {len(given)}")
    return [_prompt(f"prompt[{place}]", entry) for place, entry in enumerate(given)]


def _prompt(field: str, given: Any) -> str | pb.TokenIds:
    if isinstance(given, str):
        return given
    return token_ids(field, given if isinstance(given, list) else [None])


class _Text:
    """Choices as texts. Remembers how long each is, for the offsets of its tokens."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl-"

    def __init__(self) -> None:
        self._lengths: dict[int, int] = {}

    def opening(self, index: int) -> None:
        """Nothing: a text begins with its first piece."""

    def whole(self, index: int, choice: pb.Choice, prompt: Sequence[pb.TokenLogprob]) -> dict[str, Any]:
        return self.delta(index, choice, prompt)

    def delta(self, index: int, choice: pb.Choice, prompt: Sequence[pb.TokenLogprob]) -> dict[str, Any]:
        tokens = [*prompt, *choice.logprobs]
        return {
            "index": index,
            "text": choice.text,
            "logprobs": self._logprobs(index, tokens) if tokens else None,
            "finish_reason": finish_reason(choice),
        }

    def _logprobs(self, index: int, tokens: Sequence[pb.TokenLogprob]) -> dict[str, Any]:
        offsets = []
        for token in tokens:
            offsets.append(self._lengths.get(index, 0))
            self._lengths[index] = offsets[-1] + len(token.token)
        known = [token if token.rank or token.top else None for token in tokens]  # not the first of a prompt
        return {
            "text_offset": offsets,
            "token_logprobs": [token and logprob_of(token) for token in known],
            "tokens": [token.token for token in tokens],
            "top_logprobs": [token and _top(token) for token in known],
        }


def _top(token: pb.TokenLogprob) -> dict[str, float]:
    """By text; of several tokens that have the same one the chosen, or else the most likely."""
    texts = {token.token: logprob_of(token)}
    for other in token.top:
        texts.setdefault(other.token, logprob_of(other))
    return texts
