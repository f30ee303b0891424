"""Log-probabilities over HTTP: texts, bytes and places of tokens, also of tokens that are parts of characters."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest
from fake_engine import FakeEngine
from servers import parse_events, post

from yuan_grpc.server.engine.types import (
    ChoiceDelta,
    EngineRequest,
    FinishReason,
    RankedToken,
    StepOutput,
    TokenLogprobs,
)
from yuan_grpc.server.http.openai import tokens

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

EOD, AB, Y, E4, B8, X96, FF, A, BYTE_A = 0, 1, 2, 3, 4, 5, 6, 7, 8
PIECES = {
    EOD: b"<eod>",
    AB: b" ab",
    Y: b"Y",
    E4: b"\xe4",
    B8: b"\xb8",
    X96: b"\x96",
    FF: b"\xff",
    A: b"A",
    BYTE_A: b"A",
}
"""`E4`, `B8` and `X96` are the bytes of 世. `A` and `BYTE_A` have the same text."""


class PieceEngine(FakeEngine):
    """An engine whose tokens are `PIECES`, and which knows the text "ab" only.

    Args:
        prompt: the ids of the prompt, for its log-probabilities.
        output: the ids of the only choice.
        text: its text, if a stop string ends it.
        parts: number of outputs that the choice is divided into.
    """

    def __init__(
        self, prompt: Sequence[int], output: Sequence[int], text: str | None = None, top: int = Y, parts: int = 1
    ) -> None:
        whole = text_of(output) if text is None else text
        prompt_logprobs = [TokenLogprobs(ranked(prompt[0], 0, 0), ()), *(with_top(i, top) for i in prompt[1:])]
        outputs = [StepOutput(prompt_logprobs=prompt_logprobs)]
        for part in range(parts):
            ids = output[part * len(output) // parts : (part + 1) * len(output) // parts]
            is_last = part == parts - 1
            reason = FinishReason.STOP if is_last else None
            delta = ChoiceDelta(0, whole if is_last else "", ids, [with_top(i, top) for i in ids], -1, reason)
            outputs.append(StepOutput([delta]))
        super().__init__(*outputs)

    async def generate(
        self, request: EngineRequest, *, stream: bool, deadline: asyncio.Event | None = None
    ) -> AsyncGenerator[StepOutput, None]:
        async for output in super().generate(request, stream=stream, deadline=deadline):
            if request.sampling.prompt_logprobs is not None or not output.prompt_logprobs:
                yield output

    async def tokenize(self, text: str) -> list[int]:
        return [AB] * (len(text) // 2)

    async def tokenize_with_offsets(self, text: str) -> list[tuple[int, str, int, int]]:
        return [(AB, "▁ab", start, start + 2) for start in range(0, len(text), 2)]

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return text_of(token_ids).removeprefix(" ")

    def token_bytes(self, token_id: int, *, skip_special_tokens: bool) -> bytes:
        return b"" if skip_special_tokens and token_id == EOD else PIECES[token_id]


def text_of(token_ids: Sequence[int]) -> str:
    """Return the text of tokens, as the engine decodes them."""
    return b"".join(PIECES[token_id] for token_id in token_ids if token_id != EOD).decode(errors="replace")


def ranked(token_id: int, logprob: float = -2, rank: int = 3) -> RankedToken:
    return RankedToken(token_id, "text of the engine", logprob, rank)


def with_top(token_id: int, top: int) -> TokenLogprobs:
    """Return a token with a more likely one."""
    return TokenLogprobs(ranked(token_id), [ranked(top, -0.5, 1)])


async def choice_of(engine: FakeEngine, path: str = COMPLETIONS, **body: Any) -> Any:
    """Return the only choice of a response."""
    return (await post(engine, path, body)).json()["choices"][0]


async def test_the_offsets_of_an_echo_are_places_in_the_text() -> None:
    for prompt in ("ab", [AB]):
        choice = await choice_of(PieceEngine([AB], [Y]), prompt=prompt, echo=True, logprobs=1)
        assert choice["text"] == "abY"
        assert choice["logprobs"]["tokens"] == [" ab", "Y"]
        assert choice["logprobs"]["text_offset"] == [0, 2]


@pytest.mark.parametrize(
    ("output", "text", "offsets"),
    [
        ([Y, EOD], "Y", [0, 1]),
        ([EOD, Y], "Y", [0, 0]),
        ([AB, Y], " abY", [0, 3]),
        ([E4, B8, X96, Y], "世Y", [0, 0, 0, 1]),
        ([Y, FF, Y], "Y\ufffdY", [0, 1, 2]),
        ([E4, B8, Y], "\ufffdY", [0, 0, 1]),
        ([E4, EOD, B8, X96], "世", [0, 0, 0, 0]),
        ([E4, E4, B8, X96, Y], "\ufffd世Y", [0, 1, 1, 1, 2]),
    ],
)
@pytest.mark.parametrize("parts", [1, 3])
async def test_an_offset_counts_what_the_tokens_before_it_put_into_the_text(
    output: list[int], text: str, offsets: list[int], parts: int
) -> None:
    engine = PieceEngine([AB], output, parts=parts)
    choice = await choice_of(engine, prompt=[AB], logprobs=1)
    assert (choice["text"], choice["logprobs"]["text_offset"]) == (text, offsets)
    echo = await choice_of(engine, prompt=[AB], logprobs=1, echo=True)
    assert (echo["text"], echo["logprobs"]["text_offset"]) == (f"ab{text}", [0, *(2 + offset for offset in offsets)])
    body = {"prompt": [AB], "logprobs": 1, "echo": True, "stream": True}
    chunks = [chunk["choices"][0] for chunk in parse_events((await post(engine, COMPLETIONS, body)).content)[:-1]]
    assert "".join(chunk["text"] for chunk in chunks) == echo["text"]
    for name, values in echo["logprobs"].items():
        assert [value for chunk in chunks if chunk["logprobs"] for value in chunk["logprobs"][name]] == values


async def test_a_character_that_the_prompt_begins_is_in_the_choice() -> None:
    engine = PieceEngine([Y, E4, B8], [X96, Y], text="世Y")
    choice = await choice_of(engine, prompt=[Y, E4, B8], logprobs=1)
    assert choice["logprobs"]["text_offset"] == [0, 1]
    echo = await choice_of(engine, prompt=[Y, E4, B8], logprobs=1, echo=True)
    assert echo["text"] == "Y\ufffd世Y"
    assert echo["logprobs"]["text_offset"] == [0, 1, 1, 2, 3]


async def test_a_long_prompt_is_located(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "INLINE_TOKENS", 1)
    choice = await choice_of(PieceEngine([AB, Y], [Y]), prompt=[AB, Y], logprobs=1, echo=True)
    assert (choice["text"], choice["logprobs"]["text_offset"]) == ("abYY", [0, 2, 3])


async def test_tokens_of_a_stop_string_are_at_the_end_of_the_text() -> None:
    choice = await choice_of(PieceEngine([AB], [Y, AB, Y, AB], text="Y"), prompt=[AB], logprobs=1, stop=" abY")
    assert (choice["text"], choice["logprobs"]["text_offset"]) == ("Y", [0, 1, 1, 1])


async def test_a_truncated_prompt_is_echoed_as_its_tokens() -> None:
    engine = PieceEngine([AB, AB], [Y])
    choice = await choice_of(engine, prompt="ababab", logprobs=1, echo=True, truncate_prompt_tokens=2)
    assert (choice["text"], choice["logprobs"]["text_offset"]) == ("ab abY", [0, 2, 5])


async def test_bytes_of_different_tokens_have_different_texts() -> None:
    """lm-eval compares the log-probability of a token with the largest of `top_logprobs`."""
    choice = await choice_of(PieceEngine([AB, E4], [B8], top=FF), prompt=[AB, E4], logprobs=1, echo=True)
    assert choice["logprobs"]["tokens"] == [" ab", r"bytes:\xe4", r"bytes:\xb8"]
    assert choice["logprobs"]["top_logprobs"][1:] == [
        {r"bytes:\xe4": -2, r"bytes:\xff": -0.5},
        {r"bytes:\xb8": -2, r"bytes:\xff": -0.5},
    ]


async def test_of_two_tokens_with_the_same_text_the_more_likely_one_is_kept() -> None:
    choice = await choice_of(PieceEngine([AB], [BYTE_A], top=A), prompt=[AB], logprobs=1)
    assert choice["logprobs"]["top_logprobs"] == [{"A": -0.5}]
    assert choice["logprobs"]["token_logprobs"] == [-2]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_tokens_can_be_shown_as_ids(path: str) -> None:
    body: dict[str, Any] = {"prompt": [AB], "logprobs": 1}
    if path == CHAT:
        body = {"messages": [{"role": "user", "content": "ab"}], "logprobs": True, "top_logprobs": 1}
    choice = await choice_of(PieceEngine([AB], [BYTE_A], top=A), path, **body, return_tokens_as_token_ids=True)
    if path == COMPLETIONS:
        assert choice["logprobs"]["tokens"] == ["token_id:8"]
        assert choice["logprobs"]["top_logprobs"] == [{"token_id:8": -2, "token_id:7": -0.5}]
    else:
        [token] = choice["logprobs"]["content"]
        assert (token["token"], token["top_logprobs"][0]["token"]) == ("token_id:8", "token_id:7")


@pytest.mark.parametrize("output", [[AB, E4, B8, X96, Y, EOD], [FF, Y], [E4, B8, Y]])
async def test_the_bytes_of_a_chat_response_are_its_content(output: list[int]) -> None:
    messages = [{"role": "user", "content": "ab"}]
    engine = PieceEngine([AB], output)
    choice = await choice_of(engine, CHAT, messages=messages, logprobs=True, top_logprobs=1)
    raw = bytes(byte for token in choice["logprobs"]["content"] for byte in token["bytes"])
    assert raw.decode(errors="replace") == choice["message"]["content"] == text_of(output)
