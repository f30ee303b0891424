"""Conversion of plain values to protobuf responses."""

import pytest

from yuan_grpc.server.core.response import MAX_ENTRIES_PER_MESSAGE, ResponseBuilder
from yuan_grpc.server.engine.types import ChoiceDelta, FinishReason, Progress, RankedToken, StepOutput, TokenLogprobs
from yuan_grpc.v1 import yuan_pb2 as pb

PROMPT = [1, 2, 3, 4, 5]
FIRST = TokenLogprobs(RankedToken(1, "a", 0.0, 0), ())
SECOND = TokenLogprobs(RankedToken(4, "d", -2.5, 9), [RankedToken(1, "a", -0.5, 1)])


def builder(echo: str = "", seed: int | None = None, prompt: list[int] = PROMPT, **fields: object) -> ResponseBuilder:
    """Return the builder for a request with these fields."""
    return ResponseBuilder(pb.GenerateRequest(request_id="id", **fields), "model", prompt, echo, seed)  # type: ignore[arg-type]


def test_choices_are_ordered_by_index() -> None:
    output = StepOutput(
        [ChoiceDelta(1, "b", [2], finish_reason=FinishReason.STOP), ChoiceDelta(0, "a", [1])], cached_tokens=3
    )
    response = builder().build_response(output)
    assert [(choice.index, choice.text) for choice in response.choices] == [(0, "a"), (1, "b")]
    assert response.usage == pb.Usage(prompt_tokens=5, completion_tokens=2)


@pytest.mark.parametrize(("salt", "cached_tokens"), [("", 0), ("mine", 3)])
def test_cached_tokens_are_reported_within_a_cache_salt_only(salt: str, cached_tokens: int) -> None:
    output = StepOutput([ChoiceDelta(0, "a", [1], finish_reason=FinishReason.STOP)], cached_tokens=3)
    assert builder(cache_salt=salt).build_response(output).usage.cached_tokens == cached_tokens
    (*_, message) = builder(cache_salt=salt).build_stream_messages(output)
    assert message.usage.cached_tokens == cached_tokens


def test_a_stream_echoes_once_per_choice_and_has_usage_where_a_choice_finishes() -> None:
    responses = builder(echo="Q")
    outputs = [
        StepOutput(),
        StepOutput([ChoiceDelta(0, "a", [1]), ChoiceDelta(1, "b", [2])]),
        StepOutput([ChoiceDelta(0, "c", [3, 4])]),
        StepOutput([ChoiceDelta(1, "", [5], finish_reason=FinishReason.LENGTH)]),
    ]
    _, *messages = [message for output in outputs for message in responses.build_stream_messages(output)]
    assert [[choice.text for choice in message.choices] for message in messages] == [["Qa", "Qb"], ["c"], [""]]
    assert [message.HasField("usage") for message in messages] == [False, False, True]
    assert messages[-1].usage.completion_tokens == 5


@pytest.mark.parametrize(("stop_reason", "field"), [("。", "stop_string"), (7, "stop_token_id"), (None, None)])
def test_a_stop_reason_is_a_string_or_a_token(stop_reason: str | int | None, field: str | None) -> None:
    delta = ChoiceDelta(0, "", [], finish_reason=FinishReason.STOP, stop_reason=stop_reason)
    (choice,) = builder().build_response(StepOutput([delta])).choices
    assert choice.WhichOneof("stopped_by") == field


def test_logprobs_keep_their_order_and_ranks() -> None:
    chosen, first = RankedToken(4, "d", -2.5, 9), RankedToken(1, "a", -0.5, 1)
    delta = ChoiceDelta(0, "d", [4], logprobs=[TokenLogprobs(chosen, [first])], cumulative_logprob=-2.5)
    (choice,) = builder().build_response(StepOutput([delta])).choices
    assert choice.logprobs[0] == pb.TokenLogprob(
        token_id=4, token="d", logprob=-2.5, rank=9, top=[pb.TopLogprob(token_id=1, token="a", logprob=-0.5, rank=1)]
    )
    assert choice.cumulative_logprob == -2.5


def test_flat_logprobs_have_the_start_of_each_position() -> None:
    delta = ChoiceDelta(0, "ad", [1, 4], logprobs=[FIRST, SECOND])
    (choice,) = builder(flat_logprobs=True).build_response(StepOutput([delta])).choices
    assert not choice.logprobs
    assert choice.flat_logprobs == pb.FlatLogprobs(
        token_ids=[1, 4, 1], logprobs=[0.0, -2.5, -0.5], ranks=[0, 9, 1], starts=[0, 1]
    )


@pytest.mark.parametrize("flat", [False, True])
def test_prompt_logprobs_are_in_the_response_or_the_first_message(flat: bool) -> None:
    output = StepOutput(prompt_logprobs=[FIRST, SECOND])
    response = builder(flat_logprobs=flat).build_response(output)
    (first,) = builder(flat_logprobs=flat, prompt_logprobs=1).build_stream_messages(output)
    assert response.prompt_logprobs == first.prompt_logprobs
    assert response.flat_prompt_logprobs == first.flat_prompt_logprobs
    assert response.HasField("flat_prompt_logprobs") == flat
    assert len(response.prompt_logprobs) == (0 if flat else 2)


def test_logprobs_of_a_long_prompt_are_split_into_messages() -> None:
    positions = [SECOND] * (MAX_ENTRIES_PER_MESSAGE + 1)
    messages = list(builder(prompt_logprobs=1).build_stream_messages(StepOutput(prompt_logprobs=positions)))
    assert [len(message.prompt_logprobs) for message in messages] == [MAX_ENTRIES_PER_MESSAGE // 2] * 2 + [1]
    assert [message.HasField("usage") for message in messages] == [True, False, False]


@pytest.mark.parametrize("flat", [False, True])
def test_an_output_too_large_for_one_message_is_split(flat: bool) -> None:
    tokens = MAX_ENTRIES_PER_MESSAGE // 2 + 1  # with log-probabilities, slightly more than half of them fit a message
    long = ChoiceDelta(1, "long", [4] * tokens, [SECOND] * tokens, -9.0, FinishReason.STOP, "x")
    output = StepOutput(
        [ChoiceDelta(0, "a", [1], [FIRST]), long, ChoiceDelta(2, "b", [2], [FIRST], -1.0)], progress=Progress(1, 1)
    )
    first, *messages = builder(echo="Q", flat_logprobs=flat).build_stream_messages(output)
    assert not first.choices
    assert max(message.ByteSize() for message in messages) < 2 << 20
    assert all(message.HasField("progress") for message in messages)
    choices = [choice for message in messages for choice in message.choices]
    assert [choice.text for choice in choices] == ["Qa", "Qlong", "", "Qb"]
    assert [choice.finish_reason for choice in choices] == [0, 0, pb.FINISH_REASON_STOP, 0]
    assert [choice.stop_string for choice in choices] == ["", "", "x", ""]
    assert [choice.HasField("cumulative_logprob") for choice in choices] == [False, False, True, True]
    assert sum(len(choice.token_ids) for choice in choices) == tokens + 2
    assert [message.HasField("usage") for message in messages] == [False] * (len(messages) - 1) + [True]
    positions = sum(len(choice.flat_logprobs.starts) if flat else len(choice.logprobs) for choice in choices)
    assert positions == tokens + 2


def test_the_first_message_has_prompt_tokens_and_seed() -> None:
    (first,) = builder(seed=0, return_prompt_token_ids=True).build_stream_messages(StepOutput())
    assert first.usage == pb.Usage(prompt_tokens=5)
    assert (first.HasField("seed"), first.seed, list(first.prompt_token_ids)) == (True, 0, PROMPT)
    (first,) = builder().build_stream_messages(StepOutput())
    assert (first.HasField("seed"), list(first.prompt_token_ids)) == (False, [])


def test_discarded_tokens_count_as_completion_tokens() -> None:
    response = builder().build_response(StepOutput([ChoiceDelta(0, "a", [1])], discarded_tokens=7))
    assert response.usage.completion_tokens == 8


def test_progress_is_in_the_message() -> None:
    _, message = builder().build_stream_messages(StepOutput(progress=Progress(3, 1, "best", -1.5)))
    assert message.progress == pb.Progress(tokens=3, finished=1, best_text="best", best_cumulative_logprob=-1.5)
    assert not message.HasField("usage")


def test_the_first_message_waits_for_prompt_logprobs_unless_a_heartbeat_is_due() -> None:
    waiting, interrupted = builder(prompt_logprobs=1), builder(prompt_logprobs=1)
    assert list(waiting.build_stream_messages(StepOutput())) == []
    (first,) = interrupted.heartbeat()
    (second,) = interrupted.heartbeat()
    (third,) = interrupted.build_stream_messages(StepOutput(prompt_logprobs=[FIRST]))
    assert [message.HasField("usage") for message in (first, second, third)] == [True, False, False]
    assert len(third.prompt_logprobs) == 1
