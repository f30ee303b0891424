"""Requests to sampling parameters, and what is said of those that are wrong."""

import math

import pytest
from fakes import INFO

from yuan_grpc.server.errors import InvalidRequestError
from yuan_grpc.server.generation import FinishReason, Piece, Position, RankedToken, Sampling, Step
from yuan_grpc.server.translate import Reply, sampling_of
from yuan_grpc.v1 import yuan_pb2 as pb

PROMPT = [65, 66]


def complaint_about(**fields: object) -> tuple[str, str]:
    """The one violation of an otherwise right request: its field and description."""
    request = pb.GenerateRequest(**({"prompt": "AB"} | fields))  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError) as raised:
        sampling_of(request, PROMPT, INFO)
    (violation,) = raised.value.violations
    assert violation.description == str(raised.value)
    return violation.field, violation.description


def test_an_empty_request_takes_the_documented_defaults() -> None:
    assert sampling_of(pb.GenerateRequest(prompt="AB"), PROMPT, INFO) == Sampling(
        n=1, max_tokens=16, temperature=1, top_p=1, top_k=0, min_p=0, repetition_penalty=1, skip_special_tokens=True
    )


def test_every_field_reaches_the_engine() -> None:
    fields: dict[str, object] = {
        "n": 2,
        "max_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 7,
        "min_p": 0.125,
        "presence_penalty": -1.5,
        "frequency_penalty": 1.5,
        "repetition_penalty": 1.25,
        "seed": 2**63 - 129,
        "stop": ("a", "b"),
        "stop_token_ids": (5, 6),
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "logprobs": 4,
    }
    request = pb.GenerateRequest(prompt="AB", **fields)  # type: ignore[arg-type]
    assert sampling_of(request, PROMPT, INFO) == Sampling(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("greedy", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_k": 1}, {"top_p": 0.0, "top_k": 1}])
def test_every_way_to_ask_for_the_most_likely_token_is_greedy(greedy: dict[str, float]) -> None:
    request = pb.GenerateRequest(prompt="AB", **greedy)  # type: ignore[arg-type]
    assert sampling_of(request, PROMPT, INFO).is_greedy
    assert not sampling_of(pb.GenerateRequest(prompt="AB"), PROMPT, INFO).is_greedy


@pytest.mark.parametrize("top_k", [-1, 0])
def test_top_k_minus_one_and_zero_mean_all_tokens(top_k: int) -> None:
    assert sampling_of(pb.GenerateRequest(prompt="AB", top_k=top_k), PROMPT, INFO).top_k == top_k


@pytest.mark.parametrize(
    ("field", "value", "description"),
    [
        ("n", 0, "`n` must be between 1 and 128, not 0"),
        ("n", 129, "`n` must be between 1 and 128, not 129"),
        ("max_tokens", 0, "`max_tokens` must be at least 1, not 0"),
        ("temperature", -1.0, "`temperature` must be between 0 and 2, not -1.0"),
        ("temperature", math.nan, "`temperature` must be between 0 and 2, not nan"),
        ("top_p", 1.5, "`top_p` must be between 0 and 1, not 1.5"),
        ("top_k", -2, "`top_k` must be at least 1, or 0 or -1 for all tokens, not -2"),
        ("min_p", -0.5, "`min_p` must be between 0 and 1, not -0.5"),
        ("presence_penalty", 2.5, "`presence_penalty` must be between -2 and 2, not 2.5"),
        ("frequency_penalty", -2.5, "`frequency_penalty` must be between -2 and 2, not -2.5"),
        ("repetition_penalty", 0.0, "`repetition_penalty` must be between 0.001 and 1000, not 0.0"),
        ("repetition_penalty", math.inf, "`repetition_penalty` must be between 0.001 and 1000, not inf"),
        ("seed", -1, "`seed` must be between 0 and 9223372036854775679, not -1"),
        ("seed", 2**63 - 1, "`seed` must be between 0 and 9223372036854775679, not 9223372036854775807"),
        ("request_id", "a\nb", "`request_id` must have printable characters only, not 'a\\nb'"),
        ("logprobs", 21, "`logprobs` must be between 0 and 20, not 21"),
        ("use_beam_search", True, "`use_beam_search` must be false, for this version has no beam search, not true"),
        ("request_id", "x" * 257, "`request_id` must be at most 256 characters long, not 257"),
        ("stop", ["x"] * 65, "`stop` must have at most 64 strings, not 65"),
        ("stop_token_ids", [1] * 1025, "`stop_token_ids` must have at most 1024 ids, not 1025"),
    ],
)
def test_a_wrong_value_is_named_with_field_and_rule(field: str, value: object, description: str) -> None:
    assert complaint_about(**{field: value}) == (field, description)


def test_a_wrong_entry_of_a_list_is_named_by_its_place() -> None:
    assert complaint_about(stop=["a", "", ""]) == ("stop[1]", "`stop[1]` must be 1 to 1024 characters long, not 0")
    assert complaint_about(stop_token_ids=[1, 0x110000]) == (
        "stop_token_ids[1]",
        "`stop_token_ids[1]` must be below 1114112, the number of tokens, not 1114112",
    )


@pytest.mark.parametrize(
    ("request_", "prompt", "description"),
    [
        (pb.GenerateRequest(), [], "one of `prompt` and `prompt_token_ids` must be given"),
        (pb.GenerateRequest(prompt=""), [], "`prompt` must not be empty"),
        (pb.GenerateRequest(prompt_token_ids=pb.TokenIds()), [], "`prompt_token_ids` must not be empty"),
        (
            pb.GenerateRequest(prompt="A" * 64),
            [65] * 64,
            "`prompt` must be at most 63 tokens long, for the model's context is 64, not 64",
        ),
        (
            pb.GenerateRequest(prompt_token_ids=pb.TokenIds(ids=[0, 0x110000, 0x110001])),
            [0, 0x110000, 0x110001],
            "`prompt_token_ids.ids[1]` must be below 1114112, the number of tokens, not 1114112",
        ),
    ],
    ids=["none", "no text", "no ids", "too long", "unknown id"],
)
def test_a_wrong_prompt_is_refused(request_: pb.GenerateRequest, prompt: list[int], description: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        sampling_of(request_, prompt, INFO)
    assert str(raised.value) == description


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(InvalidRequestError) as raised:
        sampling_of(pb.GenerateRequest(n=0, top_p=2, stop=[""]), [], INFO)
    assert [violation.field for violation in raised.value.violations] == ["prompt", "n", "top_p", "stop[0]"]


def test_choices_come_in_the_order_of_their_indices() -> None:
    step = Step([Piece(1, "b", [2], finish_reason=FinishReason.STOP), Piece(0, "a", [1])], cached_tokens=3)
    response = Reply("id", "model", 5, echo="").whole(step)
    assert [(choice.index, choice.text) for choice in response.choices] == [(0, "a"), (1, "b")]
    assert response.usage == pb.Usage(prompt_tokens=5, completion_tokens=2, cached_tokens=3)


def test_a_stream_echoes_once_a_choice_and_counts_where_one_ends() -> None:
    reply = Reply("id", "model", 5, echo="Q")
    parts = [
        reply.part(Step([Piece(0, "a", [1]), Piece(1, "b", [2])], 0)),
        reply.part(Step([Piece(0, "c", [3, 4])], 0)),
        reply.part(Step([Piece(1, "", [5], finish_reason=FinishReason.LENGTH)], 0)),
    ]
    assert [[choice.text for choice in part.choices] for part in parts] == [["Qa", "Qb"], ["c"], [""]]
    assert [part.HasField("usage") for part in parts] == [False, False, True]
    assert parts[-1].usage.completion_tokens == 5


@pytest.mark.parametrize(("stopped_by", "field"), [("。", "stop_string"), (7, "stop_token_id"), (None, None)])
def test_what_stopped_a_choice_is_a_string_or_a_token(stopped_by: str | int | None, field: str | None) -> None:
    piece = Piece(0, "", [], finish_reason=FinishReason.STOP, stopped_by=stopped_by)
    (choice,) = Reply("id", "model", 1, echo="").whole(Step([piece], 0)).choices
    assert choice.WhichOneof("stopped_by") == field


def test_logprobs_keep_their_order_and_ranks() -> None:
    chosen, first = RankedToken(4, "d", -2.5, 9), RankedToken(1, "a", -0.5, 1)
    piece = Piece(0, "d", [4], positions=[Position(chosen, [first])], cumulative_logprob=-2.5)
    (choice,) = Reply("id", "model", 1, echo="").whole(Step([piece], 0)).choices
    assert choice.logprobs[0] == pb.TokenLogprob(
        token_id=4, token="d", logprob=-2.5, rank=9, top=[pb.TopLogprob(token_id=1, token="a", logprob=-0.5, rank=1)]
    )
    assert choice.cumulative_logprob == -2.5
