"""`max_tokens` 0: the prompt alone, with its log-probabilities, over gRPC and HTTP."""

from typing import Any

import grpc
import pytest
from fake_engine import FakeEngine, last
from servers import parse_events, post, serve_grpc

from yuan_grpc.server.engine.types import ChoiceDelta, FinishReason, RankedToken, StepOutput, TokenLogprobs
from yuan_grpc.v1 import yuan_pb2 as pb
from yuan_grpc.v1 import yuan_pb2_grpc

TOKENS = (
    TokenLogprobs(RankedToken(ord("A"), "A", 0, 0), ()),
    TokenLogprobs(RankedToken(ord("B"), "B", -2, 3), [RankedToken(ord("x"), "x", -0.5, 1)]),
)


def scoring_engine() -> FakeEngine:
    """Return an engine that generates a token although none is wanted, as vLLM does."""
    [delta] = last("!").deltas
    return FakeEngine(StepOutput([delta], prompt_logprobs=TOKENS))


async def generate(engine: FakeEngine, **fields: Any) -> pb.GenerateResponse:
    """Return the response of Generate."""
    async with serve_grpc(engine) as address, grpc.aio.insecure_channel(address) as channel:
        request = pb.GenerateRequest(prompt="AB", max_tokens=0, **fields)
        response: pb.GenerateResponse = await yuan_pb2_grpc.YuanServiceStub(channel).Generate(request)
        return response


async def stream(engine: FakeEngine, **fields: Any) -> list[pb.GenerateStreamResponse]:
    """Return the messages of GenerateStream."""
    async with serve_grpc(engine) as address, grpc.aio.insecure_channel(address) as channel:
        request = pb.GenerateRequest(prompt="AB", max_tokens=0, **fields)
        return [message async for message in yuan_pb2_grpc.YuanServiceStub(channel).GenerateStream(request)]


async def test_generate_returns_the_prompt_and_its_logprobs_alone() -> None:
    engine = scoring_engine()
    response = await generate(engine, echo=True, prompt_logprobs=1, logprobs=1, n=2, temperature=0.5)
    assert [(choice.index, choice.text, list(choice.token_ids)) for choice in response.choices] == [
        (0, "AB", []),
        (1, "AB", []),
    ]
    assert {choice.finish_reason for choice in response.choices} == {pb.FINISH_REASON_LENGTH}
    assert [token.logprob for token in response.prompt_logprobs] == [0, -2]
    assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (2, 0)
    assert not response.HasField("seed")
    [request] = engine.requests
    assert (request.sampling.max_tokens, request.sampling.n, request.sampling.prompt_logprobs) == (1, 1, 1)


async def test_a_stream_has_the_same_content() -> None:
    first, *_, end = await stream(scoring_engine(), echo=True, prompt_logprobs=1)
    assert [token.token for token in first.prompt_logprobs] == ["A", "B"]
    assert [(choice.text, choice.finish_reason) for choice in end.choices] == [("AB", pb.FINISH_REASON_LENGTH)]
    assert (end.usage.prompt_tokens, end.usage.completion_tokens) == (2, 0)


@pytest.mark.parametrize("fields", [{"use_beam_search": True, "best_of": 2}, {"best_of": 3}], ids=str)
async def test_searches_generate_nothing_either(fields: dict[str, Any]) -> None:
    engine = scoring_engine()
    response = await generate(engine, echo=True, **fields)
    assert [choice.text for choice in response.choices] == ["AB"]
    assert [request.sampling.max_tokens for request in engine.requests] == [1]


async def test_a_deadline_is_reported() -> None:
    cut = StepOutput([ChoiceDelta(0, "", (), finish_reason=FinishReason.DEADLINE)])
    response = await generate(FakeEngine(cut), echo=True)
    assert response.choices[0].finish_reason == pb.FINISH_REASON_DEADLINE


async def test_the_request_must_ask_for_something() -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await generate(scoring_engine())
    assert raised.value.details() == "`max_tokens` must be at least 1 without `echo` or `prompt_logprobs`, not 0"


@pytest.mark.parametrize("streamed", [False, True])
async def test_completions_score_the_prompt_alone(streamed: bool) -> None:
    body = {"prompt": "AB", "max_tokens": 0, "echo": True, "logprobs": 1, "stream": streamed}
    response = await post(scoring_engine(), "/v1/completions", body)
    content = parse_events(response.content)[0] if streamed else response.json()
    [choice] = content["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("AB", "length")
    assert choice["logprobs"] == {
        "text_offset": [0, 1],
        "token_logprobs": [None, -2],
        "tokens": ["A", "B"],
        "top_logprobs": [None, {"x": -0.5, "B": -2}],
    }
    assert streamed or content["usage"]["completion_tokens"] == 0


async def test_generate_over_http_returns_the_prompt_alone() -> None:
    response = await post(scoring_engine(), "/generate", {"prompt": "AB", "max_tokens": 0})
    assert response.json() == {"text": ["AB"]}
