"""The texts, bytes and offsets of tokens, as OpenAI's log-probabilities show them."""

import asyncio
from codecs import getincrementaldecoder
from collections.abc import Sequence
from dataclasses import dataclass, field

from yuan_grpc.server.core.generation_service import GenerationService
from yuan_grpc.server.engine.protocol import Engine
from yuan_grpc.v1 import yuan_pb2 as pb

MIN_LOGPROB = -9999.0
"""Lowest log-probability in a response: JSON has no minus infinity."""

PRECEDING_TOKENS = 16
"""Number of the prompt's last tokens that can belong to a character which the output completes; three are enough."""

INLINE_TOKENS = 2048
"""Tokens of a prompt to locate on the event loop, a few milliseconds of work; more are located in a thread."""

_UTF8_DECODER = getincrementaldecoder("utf-8")


def finite_logprob(token: pb.TokenLogprob | pb.TopLogprob) -> float:
    """Return a token's log-probability as a number that JSON can represent."""
    return max(token.logprob, MIN_LOGPROB)


class TokenTexts:
    """The texts and bytes of tokens, cached by id.

    Args:
        engine: the engine whose tokens they are.
        as_ids: whether to show a token as `token_id:` with its id. Different tokens can have the same text.
        skip_special_tokens: whether special tokens add nothing to the output.
    """

    def __init__(self, engine: Engine, *, as_ids: bool, skip_special_tokens: bool) -> None:
        self._engine = engine
        self._as_ids = as_ids
        self._skip_special_tokens = skip_special_tokens
        self._texts: dict[int, str] = {}
        self._output_bytes: dict[int, bytes] = {}

    def text(self, token_id: int) -> str:
        """Return the text of a token. Bytes that are not a text by themselves are written as in OpenAI's API."""
        if (text := self._texts.get(token_id)) is None:
            self._texts[token_id] = text = self._describe(token_id)
        return text

    def output_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token adds to the output."""
        if (raw := self._output_bytes.get(token_id)) is None:
            raw = self._engine.token_bytes(token_id, skip_special_tokens=self._skip_special_tokens)
            self._output_bytes[token_id] = raw
        return raw

    def _describe(self, token_id: int) -> str:
        if self._as_ids:
            return f"token_id:{token_id}"
        raw = self._engine.token_bytes(token_id, skip_special_tokens=False)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class TextPosition:
    """A running offset in a text, in characters. All bytes of a character have its offset.

    Args:
        start: number of characters before the first token.
    """

    def __init__(self, start: int = 0) -> None:
        self._characters = start
        self._decoder = _UTF8_DECODER("replace")

    def set_preceding_bytes(self, raw: bytes) -> None:
        """Set the bytes before the first token, which may end with an incomplete character."""
        self._decoder.decode(raw)

    def advance(self, raw: bytes) -> int:
        """Return the offset of a token, and move to the end of its bytes."""
        if not raw:
            return self._characters
        self._characters += len(self._decoder.decode(raw[:1]))
        is_incomplete = bool(self._decoder.getstate()[0])
        offset = self._characters if is_incomplete else self._characters - 1
        self._characters += len(self._decoder.decode(raw[1:]))
        return offset


@dataclass
class Prompt:
    """A prompt in a response.

    Attributes:
        token_ids: its token ids, if requested.
        logprobs: its log-probabilities, if requested.
        text_offsets: the offset of each token in the echo, if it has log-probabilities.
        echo_length: the characters of the echo that each choice begins with.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[pb.TokenLogprob] = field(default_factory=list)
    text_offsets: Sequence[int] = ()
    echo_length: int = 0


async def locate_prompt(prompt: Prompt, request: pb.GenerateRequest, service: GenerationService) -> None:
    """Set where the tokens of an echoed prompt are in the text of each choice.

    The echo is the text of the request or, if the prompt has been truncated or given as ids, the text of its tokens.
    """
    if not request.echo:
        return
    engine, skip = service.engine, not request.HasField("skip_special_tokens") or request.skip_special_tokens
    if request.HasField("prompt"):
        async with service.tokenization_permit(len(request.prompt)):
            tokens = await engine.tokenize_with_offsets(request.prompt)
        if [token_id for token_id, *_ in tokens] == prompt.token_ids:
            prompt.text_offsets, prompt.echo_length = [start for _, _, start, _ in tokens], len(request.prompt)
            return
    if len(prompt.token_ids) <= INLINE_TOKENS:
        _locate_tokens(prompt, engine, skip)
    else:
        await asyncio.to_thread(_locate_tokens, prompt, engine, skip)


def _locate_tokens(prompt: Prompt, engine: Engine, skip_special_tokens: bool) -> None:
    """Set the offsets of a prompt's tokens in their joint text."""
    raws = [engine.token_bytes(token_id, skip_special_tokens=skip_special_tokens) for token_id in prompt.token_ids]
    prompt.echo_length = len(engine.detokenize(prompt.token_ids, skip_special_tokens=skip_special_tokens))
    position, leading = TextPosition(), int(b"".join(raws).startswith(b" "))  # a text begins without the first space
    prompt.text_offsets = [min(max(position.advance(raw) - leading, 0), prompt.echo_length) for raw in raws]
