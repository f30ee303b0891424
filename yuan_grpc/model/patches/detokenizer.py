"""Hold back incomplete characters only, not every text that ends with U+FFFD.

Why: vLLM waits for more tokens while a text ends with U+FFFD, its sign for the bytes of an incomplete character. But
    that character also stands for bytes that no character has, and a text can contain it. At the end of a text it is
    lost, with all text that was held back, and a stop string that ends with it is found a token late.
How: `IncrementalDetokenizer.from_new_request` returns a `YuanDetokenizer` for Yuan's tokenizer, which decodes bytes.
Upstream: not reported yet; seen with vLLM 0.32.0. Text: docs/upstream/detokenizer.md.
Remove when: vLLM holds back incomplete characters only.
"""

from codecs import getincrementaldecoder
from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.detokenizer import BaseIncrementalDetokenizer, IncrementalDetokenizer

from yuan_grpc.model.tokenizer import YuanTokenizer
from yuan_grpc.vllm_check import check_vllm

TARGETS = {
    "vllm.v1.engine.detokenizer:IncrementalDetokenizer.from_new_request": "tokenizer, request",
    "vllm.v1.engine.detokenizer:BaseIncrementalDetokenizer.decode_next": "self, next_token_id",
}

PROMPT_TOKENS = 16
"""Number of the prompt's last tokens to read. Only the last three bytes can belong to a character that goes on."""

UTF8_DECODER = getincrementaldecoder("utf-8")


def apply() -> None:
    """Apply the patch in this process. Safe to call twice."""
    check_vllm(__name__, TARGETS)
    if not hasattr(IncrementalDetokenizer.from_new_request, "__wrapped__"):
        IncrementalDetokenizer.from_new_request = staticmethod(
            _with_yuan_detokenizer(IncrementalDetokenizer.from_new_request)
        )


def _with_yuan_detokenizer(from_new_request: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(from_new_request)
    def create(tokenizer: Any, request: EngineCoreRequest) -> IncrementalDetokenizer:
        if isinstance(tokenizer, YuanTokenizer) and request.prompt_token_ids is not None:
            return YuanDetokenizer(tokenizer, request)
        detokenizer: IncrementalDetokenizer = from_new_request(tokenizer, request)
        return detokenizer

    return create


class YuanDetokenizer(BaseIncrementalDetokenizer):
    """The text of one choice, decoded from the bytes of its tokens. An incomplete character at the end is omitted.

    A character that the prompt begins and the choice completes belongs to the choice.
    """

    def __init__(self, tokenizer: YuanTokenizer, request: EngineCoreRequest) -> None:
        super().__init__(request)
        assert request.sampling_params is not None
        assert request.prompt_token_ids is not None
        self._tokenizer = tokenizer
        self._skip_special_tokens = request.sampling_params.skip_special_tokens
        self._decoder = UTF8_DECODER("replace")
        for token_id in request.prompt_token_ids[-PROMPT_TOKENS:]:
            self.decode_next(token_id)

    def decode_next(self, next_token_id: int) -> str:
        """Return the characters that a token completes."""
        return self._decoder.decode(self._tokenizer.token_bytes(next_token_id, self._skip_special_tokens))
