"""`/v1/completions`: OpenAI's completions API, for one or more prompts."""

from collections.abc import Sequence
from typing import Any

from yuan_grpc.server.core.validation import reject
from yuan_grpc.server.http.call import HttpCall
from yuan_grpc.server.http.json_body import to_token_ids
from yuan_grpc.server.http.openai.params import build_request, constraint_names, pop_common_fields
from yuan_grpc.server.http.openai.streaming import OpenAIRequest, finish_reason, finite_logprob, send_response
from yuan_grpc.v1 import yuan_pb2 as pb

MAX_PROMPTS = 1024
MAX_COPIED_BYTES = 2**26
"""Maximum size of the parameters, over the copies for each prompt."""
_FIELD_NAMES = {"prompt_token_ids.ids": "prompt", "prompt_token_ids": "prompt"}


async def handle(call: HttpCall) -> None:
    """Respond with the choices of each prompt, in the order of the prompts."""
    await send_response(call, _parse(await call.read_json(), call), _CompletionFormat())


def _parse(body: dict[str, Any], call: HttpCall) -> OpenAIRequest:
    fields = dict(body)
    stream, include_usage = pop_common_fields(fields)
    if "messages" in fields:
        reject("messages", "`messages` must not be given here: use /v1/chat/completions")
    prompts = _prompts(fields.pop("prompt", None))
    common, model = build_request(fields, call, constraint_names(body))
    names = _FIELD_NAMES | constraint_names(body)
    if common.echo and common.HasField("logprobs"):
        common.prompt_logprobs = common.logprobs
        names = names | {"prompt_logprobs": "logprobs"}
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
    return OpenAIRequest(requests, model, stream, include_usage, names)


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
    """Choices as texts. Keeps the length of each text for its tokens' offsets."""

    object_type = chunk_object_type = "text_completion"
    id_prefix = "cmpl-"

    def __init__(self) -> None:
        self._lengths: dict[int, int] = {}

    def opening(self, index: int) -> None:
        """Return nothing: completions have no chunk before the first text."""

    def full(self, index: int, choice: pb.Choice, prompt: Sequence[pb.TokenLogprob]) -> dict[str, Any]:
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
        with_logprob = [token if token.rank or token.top else None for token in tokens]  # a prompt's first has none
        return {
            "text_offset": offsets,
            "token_logprobs": [token and finite_logprob(token) for token in with_logprob],
            "tokens": [token.token for token in tokens],
            "top_logprobs": [token and _top_logprobs(token) for token in with_logprob],
        }


def _top_logprobs(token: pb.TokenLogprob) -> dict[str, float]:
    """Return log-probabilities by text. Of tokens with equal text, keep the sampled or else the most likely one."""
    logprobs = {token.token: finite_logprob(token)}
    for top in token.top:
        logprobs.setdefault(top.token, finite_logprob(top))
    return logprobs
