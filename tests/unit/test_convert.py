"""Messages to plain values."""

import pytest
from fake_engine import INFO
from google.protobuf.struct_pb2 import Value

from yuan_grpc.server.core.convert import plan_request, sampling_of, truncated
from yuan_grpc.server.engine.types import BeamSearchParams, Constraint, Repetition, Sampling
from yuan_grpc.v1 import yuan_pb2 as pb

PROMPT = [65, 66]


def test_an_empty_request_takes_the_documented_defaults() -> None:
    assert sampling_of(pb.GenerateRequest(prompt="AB")) == Sampling(
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
        "min_tokens": 1,
        "prompt_logprobs": 2,
        "stream_interval": 3,
        "skip_reading_prefix_cache": False,
        "logprob_token_ids": (1, 2, 3, 4),
        "logit_bias": {5: 0.5},
        "allowed_token_ids": (5, 6),
        "bad_words": ("x",),
    }
    request = pb.GenerateRequest(prompt="AB", **fields)  # type: ignore[arg-type]
    assert sampling_of(request) == Sampling(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("greedy", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_k": 1}, {"top_p": 0.0, "top_k": 1}])
def test_every_way_to_ask_for_the_most_likely_token_is_greedy(greedy: dict[str, float]) -> None:
    request = pb.GenerateRequest(prompt="AB", **greedy)  # type: ignore[arg-type]
    assert sampling_of(request).is_greedy
    assert not sampling_of(pb.GenerateRequest(prompt="AB")).is_greedy


@pytest.mark.parametrize("top_k", [-1, 0])
def test_top_k_minus_one_and_zero_mean_all_tokens(top_k: int) -> None:
    assert sampling_of(pb.GenerateRequest(prompt="AB", top_k=top_k)).top_k == top_k


@pytest.mark.parametrize(
    ("outputs", "constraint"),
    [
        (pb.StructuredOutputs(json="{}"), Constraint("json", "{}")),
        (pb.StructuredOutputs(json_object=True), Constraint("json_object", True)),
        (pb.StructuredOutputs(choice=pb.StringList(values=["a", "b"])), Constraint("choice", ("a", "b"))),
    ],
    ids=["json", "json_object", "choice"],
)
def test_a_constraint_is_its_kind_and_specification(outputs: pb.StructuredOutputs, constraint: Constraint) -> None:
    assert sampling_of(pb.GenerateRequest(structured_outputs=outputs)).structured_outputs == constraint


def test_repetition_detection_is_off_unless_given() -> None:
    detection = pb.RepetitionDetection(max_pattern_size=4, min_count=3)
    assert sampling_of(pb.GenerateRequest(repetition_detection=detection)).repetition_detection == Repetition(4, 0, 3)
    assert sampling_of(pb.GenerateRequest()).repetition_detection is None


def test_best_of_is_n_unless_given() -> None:
    assert plan_request(pb.GenerateRequest(n=3), PROMPT, INFO).best_of == 3
    work = plan_request(pb.GenerateRequest(n=3, best_of=5), PROMPT, INFO)
    assert (work.best_of, work.engine_request.sampling.n, work.beam) == (5, 3, None)


def test_a_beam_is_as_wide_as_best_of() -> None:
    request = pb.GenerateRequest(use_beam_search=True, n=2, best_of=4, length_penalty=0, seed=1)
    assert plan_request(request, PROMPT, INFO).beam == BeamSearchParams(
        n=2, width=4, length_penalty=0, early_stopping=False
    )
    request.early_stopping.CopyFrom(Value(string_value="never"))
    work = plan_request(request, PROMPT, INFO)
    assert work.beam is not None
    assert work.beam.early_stopping == "never"
    assert (
        work.engine_request.sampling.n,
        work.engine_request.sampling.seed,
        work.engine_request.sampling.is_greedy,
    ) == (1, None, True)


def test_the_served_model_by_name_is_no_adapter() -> None:
    assert plan_request(pb.GenerateRequest(model="fake"), PROMPT, INFO).engine_request.lora == ""
    assert plan_request(pb.GenerateRequest(model="style"), PROMPT, INFO).engine_request.lora == "style"


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({}, range(100)),
        ({"truncate_prompt_tokens": 3}, range(97, 100)),
        ({"truncate_prompt_tokens": 3, "truncation_side": pb.TRUNCATION_SIDE_RIGHT}, range(3)),
        ({"truncate_prompt_tokens": 200}, range(100)),
        ({"truncate_prompt_tokens": -1}, range(52, 100)),
        ({"truncate_prompt_tokens": -1, "max_tokens": 60}, range(96, 100)),
    ],
    ids=["not", "left", "right", "shorter", "what fits", "what fits with max_tokens"],
)
def test_a_long_prompt_is_cut_where_asked(fields: dict[str, int], kept: range) -> None:
    request = pb.GenerateRequest(**fields)  # type: ignore[arg-type]
    assert list(truncated(request, list(range(100)), INFO)) == list(kept)
