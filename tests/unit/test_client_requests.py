"""The conversion of prompts and parameters to protobuf messages."""

from typing import Any

import numpy
import pytest

from yuan_grpc.client import InvalidRequestError, MessageLike, Parameters
from yuan_grpc.client.base import Readiness
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


def request_with(**parameters: Any) -> pb.GenerateRequest:
    return generate_request("a", parameters)


def test_parameters_cover_all_fields_of_the_request() -> None:
    fields = set(pb.GenerateRequest.DESCRIPTOR.fields_by_name) - {"prompt", "prompt_token_ids", "messages"}
    constraints = set(pb.StructuredOutputs.DESCRIPTOR.fields_by_name)
    assert set(Parameters.__annotations__) == fields | constraints | set(CALL_OPTIONS)


@pytest.mark.parametrize("name", sorted(set(Parameters.__annotations__) - set(CALL_OPTIONS)))
def test_every_parameter_sets_its_field_unless_it_is_none(name: str) -> None:
    field = pb.GenerateRequest.DESCRIPTOR.fields_by_name.get(name)
    value = VALUES.get(name, True if field and field.type == field.TYPE_BOOL else 3)
    assert request_with(**{name: value}) != request_with()
    assert request_with(**{name: None}) == request_with()


def test_values_have_convenient_forms() -> None:
    assert list(request_with(stop="<eod>").stop) == ["<eod>"]
    assert list(request_with(bad_words="no").bad_words) == ["no"]
    assert request_with(early_stopping=True).early_stopping.bool_value is True
    assert request_with(early_stopping="never").early_stopping.string_value == "never"
    assert request_with(truncation_side="left").truncation_side == pb.TRUNCATION_SIDE_LEFT
    assert request_with(truncation_side=pb.TRUNCATION_SIDE_RIGHT).truncation_side == pb.TRUNCATION_SIDE_RIGHT
    assert request_with(heartbeat_interval=1.5).heartbeat_interval.ToNanoseconds() == 1_500_000_000
    assert request_with(logit_bias={3: -1.0}).logit_bias == {3: -1.0}
    assert request_with(repetition_detection=pb.RepetitionDetection(min_count=2)).repetition_detection.min_count == 2
    assert request_with(json={"a": "中"}).structured_outputs.json == '{"a": "中"}'
    assert request_with(json="{}").structured_outputs.json == "{}"
    assert list(request_with(choice=["a"]).structured_outputs.choice.values) == ["a"]


def test_zero_is_different_from_absent() -> None:
    assert request_with(temperature=0).HasField("temperature")
    assert request_with(skip_special_tokens=False).HasField("skip_special_tokens")
    assert not request_with().HasField("temperature")


def test_parameters_override_a_complete_request_without_changing_it() -> None:
    complete = pb.GenerateRequest(prompt="a", max_tokens=3, stop=["x"], seed=1)
    merged = generate_request(complete, {"max_tokens": 5, "stop": "y", "seed": None})
    assert (merged.prompt, merged.max_tokens, list(merged.stop), merged.seed) == ("a", 5, ["y"], 1)
    assert (complete.max_tokens, list(complete.stop)) == (3, ["x"])


def test_conversations_and_token_ids_are_distinguished() -> None:
    array: Any = numpy.array([1, 2])
    assert list(generate_request(array, {}).prompt_token_ids.ids) == [1, 2]
    assert generate_request([], {}).WhichOneof("input") == "prompt_token_ids"
    conversation: list[MessageLike] = [("user", "a"), {"role": "assistant", "content": "b"}]
    messages = generate_request(conversation, {}).messages
    assert [(message.role, message.content) for message in messages] == [("user", "a"), ("assistant", "b")]


@pytest.mark.parametrize("prompt", [b"a", 7, None, {"role": "user"}, ("user", "hello"), [("a", "b", "c")], [1.5]])
def test_an_invalid_prompt_is_a_type_error(prompt: Any) -> None:
    with pytest.raises(TypeError, match=r"`prompt|`messages"):
        generate_request(prompt, {})


@pytest.mark.parametrize("parameters", [{"max_tokens": "3"}, {"stop": 3}, {"logit_bias": [1]}, {"json": 3}])
def test_a_wrong_type_is_a_type_error_that_names_the_field(parameters: Any) -> None:
    with pytest.raises(TypeError, match=f"`{next(iter(parameters))}`: "):
        request_with(**parameters)


@pytest.mark.parametrize(
    ("prompt", "parameters", "field"),
    [
        ("\ud800", {}, "prompt"),
        ([-1], {}, "prompt_token_ids"),
        ([("user", "\ud800")], {}, "messages"),
        ("a", {"max_tokens": 1 << 40}, "max_tokens"),
        ("a", {"truncation_side": "middle"}, "truncation_side"),
        ("a", {"heartbeat_interval": float("nan")}, "heartbeat_interval"),
    ],
)
def test_a_value_that_cannot_be_encoded_is_an_invalid_request(prompt: Any, parameters: Any, field: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        generate_request(prompt, parameters)
    assert [violation.field for violation in raised.value.violations] == [field]
    assert raised.value.reason == "INVALID_REQUEST"
    assert isinstance(raised.value.__cause__, ValueError)


def test_tokenize_and_detokenize_requests_are_converted() -> None:
    assert tokenize_request("a").prompt == "a"
    assert tokenize_request("").HasField("prompt")
    assert tokenize_request([("user", "a")]).messages[0].content == "a"
    assert detokenize_request([1, 2], True) == pb.DetokenizeRequest(token_ids=[1, 2], skip_special_tokens=True)
    with pytest.raises(InvalidRequestError):
        detokenize_request([-1], False)


def test_the_connect_timeout_of_a_wait_ends_with_the_first_health_status() -> None:
    ready = Readiness("service", 600, 10)
    assert 5 < ready.remaining_seconds <= 10
    assert "within 10 s: no health status was received" in str(ready.timeout_error())
    ready.record_status(2)
    assert 590 < ready.remaining_seconds <= 600
    assert "within 600 s: its health was NOT_SERVING" in str(ready.timeout_error())
