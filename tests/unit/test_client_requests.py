"""Keywords and prompts to messages."""

from typing import Any

import numpy
import pytest

from yuan_grpc.client import InvalidRequestError, MessageLike, Parameters
from yuan_grpc.client.requests import CALL_OPTIONS, detokenize_request, generate_request, tokenize_request
from yuan_grpc.v1 import yuan_pb2 as pb

VALUES: dict[str, Any] = {
    "request_id": "mine",
    "stop": ["a", "b"],
    "stop_token_ids": [1],
    "early_stopping": "never",
    "cache_salt": "salt",
    "model": "other",
    "truncation_side": "right",
    "logit_bias": {5: 1.5},
    "allowed_token_ids": (1, 2),
    "bad_words": ["no"],
    "repetition_detection": {"max_pattern_size": 3, "min_count": 2},
    "logprob_token_ids": [3],
    "structured_outputs": pb.StructuredOutputs(regex="a+"),
    "heartbeat_interval": 0.5,
    "json": {"type": "object"},
    "json_object": True,
    "regex": "a",
    "choice": ["a", "b"],
    "grammar": "root",
    "structural_tag": {"type": "structural_tag"},
    "temperature": 0.5,
    "top_p": 0.5,
    "min_p": 0.5,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 0.5,
    "length_penalty": 0.5,
}


def made(**keywords: Any) -> pb.GenerateRequest:
    return generate_request("a", keywords)


def test_keywords_are_all_fields_of_the_request() -> None:
    fields = set(pb.GenerateRequest.DESCRIPTOR.fields_by_name) - {"prompt", "prompt_token_ids", "messages"}
    constraints = set(pb.StructuredOutputs.DESCRIPTOR.fields_by_name)
    assert set(Parameters.__annotations__) == fields | constraints | set(CALL_OPTIONS)


@pytest.mark.parametrize("name", sorted(set(Parameters.__annotations__) - set(CALL_OPTIONS)))
def test_every_keyword_sets_its_field_and_none_leaves_it(name: str) -> None:
    flag = pb.GenerateRequest.DESCRIPTOR.fields_by_name.get(name)
    value = VALUES.get(name, True if flag and flag.type == flag.TYPE_BOOL else 3)
    assert made(**{name: value}) != made()
    assert made(**{name: None}) == made()


def test_values_have_convenient_forms() -> None:
    assert list(made(stop="<eod>").stop) == ["<eod>"]
    assert list(made(bad_words="no").bad_words) == ["no"]
    assert made(early_stopping=True).early_stopping.bool_value is True
    assert made(early_stopping="never").early_stopping.string_value == "never"
    assert made(truncation_side="left").truncation_side == pb.TRUNCATION_SIDE_LEFT
    assert made(truncation_side=pb.TRUNCATION_SIDE_RIGHT).truncation_side == pb.TRUNCATION_SIDE_RIGHT
    assert made(heartbeat_interval=1.5).heartbeat_interval.ToNanoseconds() == 1_500_000_000
    assert made(logit_bias={3: -1.0}).logit_bias == {3: -1.0}
    assert made(repetition_detection=pb.RepetitionDetection(min_count=2)).repetition_detection.min_count == 2
    assert made(json={"a": "中"}).structured_outputs.json == '{"a": "中"}'
    assert made(json="{}").structured_outputs.json == "{}"
    assert list(made(choice=["a"]).structured_outputs.choice.values) == ["a"]


def test_zero_is_not_absence() -> None:
    assert made(temperature=0).HasField("temperature")
    assert made(skip_special_tokens=False).HasField("skip_special_tokens")
    assert not made().HasField("temperature")


def test_keywords_stand_above_a_ready_request_which_stays_as_it_is() -> None:
    ready = pb.GenerateRequest(prompt="a", max_tokens=3, stop=["x"], seed=1)
    made = generate_request(ready, {"max_tokens": 5, "stop": "y", "seed": None})
    assert (made.prompt, made.max_tokens, list(made.stop), made.seed) == ("a", 5, ["y"], 1)
    assert (ready.max_tokens, list(ready.stop)) == (3, ["x"])


def test_a_conversation_is_told_from_token_ids() -> None:
    array: Any = numpy.array([1, 2])
    assert list(generate_request(array, {}).prompt_token_ids.ids) == [1, 2]
    assert generate_request([], {}).WhichOneof("input") == "prompt_token_ids"
    turns: list[MessageLike] = [("user", "a"), {"role": "assistant", "content": "b"}]
    messages = generate_request(turns, {}).messages
    assert [(turn.role, turn.content) for turn in messages] == [("user", "a"), ("assistant", "b")]


@pytest.mark.parametrize("prompt", [b"a", 7, None, {"role": "user"}, ("user", "hello"), [("a", "b", "c")], [1.5]])
def test_what_is_no_prompt_is_a_type_error(prompt: Any) -> None:
    with pytest.raises(TypeError, match=r"`prompt|turn|messages"):
        generate_request(prompt, {})


@pytest.mark.parametrize("keywords", [{"max_tokens": "3"}, {"stop": 3}, {"logit_bias": [1]}, {"json": 3}])
def test_a_wrong_type_is_a_type_error_that_names_the_field(keywords: Any) -> None:
    with pytest.raises(TypeError, match=f"`{next(iter(keywords))}`: "):
        made(**keywords)


@pytest.mark.parametrize(
    ("prompt", "keywords", "field"),
    [
        ("\ud800", {}, "prompt"),
        ([-1], {}, "prompt_token_ids"),
        ([("user", "\ud800")], {}, "messages"),
        ("a", {"max_tokens": 1 << 40}, "max_tokens"),
        ("a", {"truncation_side": "middle"}, "truncation_side"),
        ("a", {"heartbeat_interval": float("nan")}, "heartbeat_interval"),
    ],
)
def test_a_value_that_cannot_be_sent_is_a_bad_request(prompt: Any, keywords: Any, field: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        generate_request(prompt, keywords)
    assert [violation.field for violation in raised.value.violations] == [field]
    assert raised.value.reason == "INVALID_REQUEST"
    assert isinstance(raised.value.__cause__, ValueError)


def test_tokenizing_takes_text_turns_and_ids() -> None:
    assert tokenize_request("a").prompt == "a"
    assert tokenize_request("").HasField("prompt")
    assert tokenize_request([("user", "a")]).messages[0].content == "a"
    assert detokenize_request([1, 2], True) == pb.DetokenizeRequest(token_ids=[1, 2], skip_special_tokens=True)
    with pytest.raises(InvalidRequestError):
        detokenize_request([-1], False)
