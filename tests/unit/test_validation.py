"""Validation of requests."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from fake_engine import INFO
from google.protobuf.duration_pb2 import Duration
from google.protobuf.struct_pb2 import NULL_VALUE, Value

from yuan_grpc.server.core.convert import ParsedRequest, to_sampling
from yuan_grpc.server.core.validation import validate_generate, validate_messages, validate_tokenize
from yuan_grpc.server.engine.types import ModelInfo
from yuan_grpc.server.errors import InvalidRequestError, ModelNotFoundError, NotEnabledError
from yuan_grpc.v1 import yuan_pb2 as pb

PROMPT = [65, 66]


def validate(
    request: pb.GenerateRequest, prompt: list[int] = PROMPT, info: ModelInfo = INFO, loras: Sequence[str] = ()
) -> None:
    validate_generate(ParsedRequest(request, prompt, request.prompt, to_sampling(request)), info, loras)


def violations_of(
    request: pb.GenerateRequest, prompt: list[int] = PROMPT, info: ModelInfo = INFO
) -> list[tuple[str, str]]:
    """Return all violations, as field and description."""
    with pytest.raises(InvalidRequestError) as raised:
        validate(request, prompt, info, ["style"])
    return [(violation.field, violation.description) for violation in raised.value.violations]


def violation_of(info: ModelInfo = INFO, /, **fields: object) -> tuple[str, str]:
    """Return the only violation of a request that is valid apart from these fields."""
    request = pb.GenerateRequest(**({"prompt": "AB"} | fields))  # type: ignore[arg-type]
    (violation,) = violations_of(request, info=info)
    return violation


@pytest.mark.parametrize(
    ("field", "value", "description"),
    [
        ("n", 0, "`n` must be between 1 and 128, not 0"),
        ("n", 129, "`n` must be between 1 and 128, not 129"),
        ("max_tokens", -1, "`max_tokens` must be at least 0, not -1"),
        ("max_tokens", 0, "`max_tokens` must be at least 1 without `echo` or `prompt_logprobs`, not 0"),
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
        ("request_id", "a\nb", "`request_id` must have only printable characters, not 'a\\nb'"),
        ("logprobs", 21, "`logprobs` must be between 0 and 20, not 21"),
        ("min_tokens", -1, "`min_tokens` must be at least 0, not -1"),
        ("min_tokens", 17, "`min_tokens` must be at most `max_tokens`, 16, not 17"),
        ("prompt_logprobs", 21, "`prompt_logprobs` must be between 0 and 20, not 21"),
        ("stream_interval", 0, "`stream_interval` must be at least 1, not 0"),
        ("truncate_prompt_tokens", 0, "`truncate_prompt_tokens` must be at least 1, or -1 for as many as fit, not 0"),
        ("truncation_side", 7, "`truncation_side` must be 0 (default), 1 (left) or 2 (right), not 7"),
        ("best_of", 0, "`best_of` must be between 1 and 128, not 0"),
        ("length_penalty", 2.0, "`length_penalty` must be 1 without `use_beam_search`, not 2.0"),
        ("early_stopping", Value(bool_value=True), "`early_stopping` must be false without `use_beam_search`"),
        ("early_stopping", Value(string_value="ever"), '`early_stopping` must be true, false or "never"'),
        ("use_beam_search", True, "`best_of` must be at least 2 with `use_beam_search`, not 1"),
        ("cache_salt", "x" * 1025, "`cache_salt` must be at most 1024 characters long, not 1025"),
        ("bad_words", ["x"] * 65, "`bad_words` must have at most 64 strings, not 65"),
        ("allowed_token_ids", [1] * 1025, "`allowed_token_ids` must have at most 1024 ids, not 1025"),
        ("logprob_token_ids", [1] * 129, "`logprob_token_ids` must have at most 128 ids, not 129"),
        ("heartbeat_interval", Duration(), "`heartbeat_interval` must be between 0.1 and 3600 seconds, not 0.0"),
        ("request_id", "x" * 257, "`request_id` must be at most 256 characters long, not 257"),
        ("stop", ["x"] * 65, "`stop` must have at most 64 strings, not 65"),
        ("stop_token_ids", [1] * 1025, "`stop_token_ids` must have at most 1024 ids, not 1025"),
    ],
)
def test_an_invalid_value_is_reported_with_field_and_rule(field: str, value: object, description: str) -> None:
    violations = violations_of(pb.GenerateRequest(**{"prompt": "AB", field: value}))  # type: ignore[arg-type]
    assert description in [text for _, text in violations]


def test_an_invalid_list_entry_is_reported_by_index() -> None:
    assert violation_of(stop=["a", "", ""]) == ("stop[1]", "`stop[1]` must be 1 to 1024 characters long, not 0")
    assert violation_of(stop_token_ids=[1, 0x110000]) == (
        "stop_token_ids[1]",
        "`stop_token_ids[1]` must be below 1114112, the vocabulary size, not 1114112",
    )


@pytest.mark.parametrize(
    ("request_", "prompt", "description"),
    [
        (pb.GenerateRequest(), [], "one of `prompt`, `prompt_token_ids` and `messages` must be given"),
        (pb.GenerateRequest(prompt=""), [], "`prompt` must not be empty"),
        (pb.GenerateRequest(prompt_token_ids=pb.TokenIds()), [], "`prompt_token_ids` must not be empty"),
        (
            pb.GenerateRequest(prompt="A" * 64),
            [65] * 64,
            "`prompt` must be at most 63 tokens long (the model's context is 64), not 64",
        ),
        (
            pb.GenerateRequest(prompt_token_ids=pb.TokenIds(ids=[0, 0x110000, 0x110001])),
            [0, 0x110000, 0x110001],
            "`prompt_token_ids.ids[1]` must be below 1114112, the vocabulary size, not 1114112",
        ),
    ],
    ids=["no input", "empty text", "no ids", "too long", "unknown id"],
)
def test_an_invalid_prompt_is_rejected(request_: pb.GenerateRequest, prompt: list[int], description: str) -> None:
    assert [text for _, text in violations_of(request_, prompt)] == [description]


def test_all_violations_are_reported_together() -> None:
    violations = violations_of(pb.GenerateRequest(n=0, top_p=2, stop=[""]), [])
    assert [field for field, _ in violations] == ["prompt", "n", "top_p", "stop[0]"]


@pytest.mark.parametrize("fields", [{"max_tokens": -1}, {"n": -3, "best_of": 2, "top_k": 1}], ids=str)
def test_an_invalid_field_causes_no_violation_of_a_valid_one(fields: dict[str, int]) -> None:
    assert violation_of(**fields)[0] == next(iter(fields))


def test_no_tokens_are_valid_with_something_to_return() -> None:
    for fields in ({"echo": True}, {"prompt_logprobs": 0}):
        validate(pb.GenerateRequest(prompt="AB", max_tokens=0, n=3, **fields))
    assert violation_of(max_tokens=0, echo=True, min_tokens=1)[0] == "min_tokens"


def test_more_choices_than_the_queue_can_hold_are_invalid() -> None:
    small = replace(INFO, max_num_queued_reqs=5)
    rule = "must be at most 5, the number of choices the server accepts at a time, not 6"
    assert violation_of(small, n=6) == ("n", f"`n` {rule}")
    assert violation_of(small, n=2, best_of=6) == ("best_of", f"`best_of` {rule}")
    for fields in ({"n": 5}, {"n": 6, "top_k": 1}, {"n": 6, "best_of": 6, "use_beam_search": True}):
        validate(pb.GenerateRequest(prompt="AB", **fields), info=small)  # type: ignore[arg-type]


def test_the_total_number_of_logprobs_is_limited() -> None:
    long = replace(INFO, max_model_len=8192)
    fields = {"n": 32, "max_tokens": 2048}
    rule = "choices × `max_tokens` × (`logprobs` + 1) must be at most 1048576, not 1114112"
    assert violation_of(long, **fields, logprobs=16) == ("logprobs", rule)
    assert violation_of(long, **fields, logprob_token_ids=range(16))[0] == "logprob_token_ids"
    validate(pb.GenerateRequest(prompt="AB", n=32, max_tokens=2048, logprobs=15), info=long)


def test_invalid_words_and_ids_are_reported_by_index() -> None:
    assert violation_of(bad_words=["a", " "])[0] == "bad_words[1]"
    assert violation_of(logit_bias={7: 101.0}) == (
        "logit_bias[7]",
        "`logit_bias[7]` must be between -100 and 100, not 101.0",
    )
    assert violation_of(logit_bias={7: math.nan})[0] == "logit_bias[7]"
    assert violation_of(logprob_token_ids=[1, 2], logprobs=3)[0] == "logprobs"
    assert violation_of(stop_token_ids=[1] * 128, min_tokens=1) == (
        "stop_token_ids",
        "`stop_token_ids` must have at most 127 ids with `min_tokens`, not 128",
    )


def test_min_tokens_must_fit_after_the_prompt() -> None:
    request = pb.GenerateRequest(prompt="A" * 60, max_tokens=16, min_tokens=5)
    ((field, description),) = violations_of(request, [65] * 60)
    assert field == "min_tokens"
    assert "4, the context that the prompt leaves" in description


@pytest.mark.parametrize(
    ("detection", "field"),
    [
        (pb.RepetitionDetection(), "max_pattern_size"),
        (pb.RepetitionDetection(max_pattern_size=2, min_pattern_size=3, min_count=2), "min_pattern_size"),
        (pb.RepetitionDetection(max_pattern_size=2, min_count=1), "min_count"),
    ],
    ids=["empty", "sizes", "count"],
)
def test_a_repetition_needs_a_pattern_and_a_count(detection: pb.RepetitionDetection, field: str) -> None:
    violations = violations_of(pb.GenerateRequest(prompt="AB", repetition_detection=detection))
    assert f"repetition_detection.{field}" in [name for name, _ in violations]


@pytest.mark.parametrize(
    ("outputs", "field"),
    [
        (pb.StructuredOutputs(), "structured_outputs"),
        (pb.StructuredOutputs(json=""), "structured_outputs.json"),
        (pb.StructuredOutputs(json_object=False), "structured_outputs.json_object"),
        (pb.StructuredOutputs(regex="山" * 11_000), "structured_outputs.regex"),
        (pb.StructuredOutputs(regex="[a-z]{1,10000}"), "structured_outputs.regex"),
        (pb.StructuredOutputs(regex="a{99999999999999999999}"), "structured_outputs.regex"),
        (pb.StructuredOutputs(json='{"pattern": "[a-z]\\u007b1,10000}"}'), "structured_outputs.json"),
        (pb.StructuredOutputs(json='{"minimum": ' + "1" * 5000 + "}"), "structured_outputs.json"),
        (pb.StructuredOutputs(choice=pb.StringList()), "structured_outputs.choice.values"),
        (pb.StructuredOutputs(choice=pb.StringList(values=["a", ""])), "structured_outputs.choice.values[1]"),
    ],
    ids=[
        "no constraint",
        "no schema",
        "no object",
        "long regex",
        "counts",
        "huge count",
        "escaped count",
        "huge number",
        "no choice",
        "empty choice",
    ],
)
def test_an_invalid_constraint_is_rejected(outputs: pb.StructuredOutputs, field: str) -> None:
    assert violation_of(structured_outputs=outputs)[0] == field


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 0.5},
        {"top_p": 0.5},
        {"top_k": 5},
        {"min_p": 0.5},
        {"presence_penalty": 1.0},
        {"repetition_penalty": 2.0},
        {"logit_bias": {1: 1.0}},
        {"allowed_token_ids": [1]},
        {"bad_words": ["a"]},
        {"structured_outputs": pb.StructuredOutputs(json_object=True)},
    ],
    ids=lambda given: next(iter(given)),
)
def test_beam_search_rejects_fields_that_change_probabilities(given: dict[str, object]) -> None:
    assert violation_of(use_beam_search=True, best_of=4, **given)[0] == next(iter(given))


@pytest.mark.parametrize(
    "early_stopping",
    [Value(bool_value=True), Value(string_value="never"), Value(null_value=NULL_VALUE)],
    ids=["true", "never", "null"],
)
def test_beam_search_accepts_its_own_parameters(early_stopping: Value) -> None:
    request = pb.GenerateRequest(prompt="AB", use_beam_search=True, best_of=4, n=2, temperature=0, top_p=1, top_k=-1)
    request.length_penalty = 0
    request.early_stopping.CopyFrom(early_stopping)
    validate(request)


def test_best_of_with_greedy_sampling_must_be_n() -> None:
    assert violation_of(best_of=3, top_k=1)[0] == "best_of"
    validate(pb.GenerateRequest(prompt="AB", best_of=3, n=3, top_k=1))


def test_a_conversation_has_known_roles_and_ends_with_the_user() -> None:
    def fields(*turns: tuple[str, str]) -> list[str]:
        with pytest.raises(InvalidRequestError) as raised:
            validate_messages([pb.Message(role=role, content=content) for role, content in turns])
        return [violation.field for violation in raised.value.violations]

    assert fields(("user", "a"), ("assistant", "b")) == ["messages[1].role"]
    assert fields(("robot", "a"), ("user", "")) == ["messages[0].role", "messages[1].content"]
    validate_messages([pb.Message(role="system", content="a"), pb.Message(role="user", content="b")])


@pytest.mark.parametrize("other", [{"ignore_eos": True}, {"min_tokens": 3}], ids=["ignore_eos", "min_tokens"])
def test_a_constraint_excludes_options_that_continue_after_it(other: dict[str, int]) -> None:
    assert violation_of(structured_outputs=pb.StructuredOutputs(regex="a"), **other)[0] == next(iter(other))


def test_truncation_to_fit_needs_context_for_the_prompt() -> None:
    assert violation_of(truncate_prompt_tokens=-1, max_tokens=64)[0] == "max_tokens"


def test_the_text_to_tokenize_is_limited() -> None:
    with pytest.raises(InvalidRequestError, match="131072 characters"):
        validate_tokenize(pb.TokenizeRequest(prompt="x" * 131_073))
    validate_tokenize(pb.TokenizeRequest(prompt="x" * 131_072))


def test_a_conversation_and_a_prompt_exclude_each_other() -> None:
    assert violation_of(messages=[pb.Message(role="user", content="a")])[0] == "messages"


def test_the_model_is_the_served_one_or_a_loaded_adapter() -> None:
    for model in ("", "fake", "style"):
        validate(pb.GenerateRequest(prompt="AB", model=model), loras=["style"])
    with pytest.raises(ModelNotFoundError, match="must be fake or a loaded LoRA adapter, not gpt"):
        validate(pb.GenerateRequest(prompt="AB", model="gpt"), loras=["style"])


def test_priority_needs_priority_scheduling() -> None:
    with pytest.raises(NotEnabledError, match="--scheduling-policy priority"):
        validate(pb.GenerateRequest(prompt="AB", priority=1))


def test_the_violations_stay_small_enough_for_headers() -> None:
    request = pb.GenerateRequest(messages=[pb.Message(role="x" * 5000)] * 1000)
    with pytest.raises(InvalidRequestError) as raised:
        validate(request)
    assert len(str(raised.value)) <= 600
    assert sum(len(violation.description) for violation in raised.value.violations) <= 2000
