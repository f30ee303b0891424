"""Conversion of requests to plain values, and their plans."""

from collections.abc import Sequence
from typing import Any

import pytest
from fake_engine import INFO, FakeEngine
from google.protobuf.struct_pb2 import Value

from yuan_grpc.server.core.convert import parse_request, to_sampling, truncate_prompt
from yuan_grpc.server.core.plan import RequestPlan, plan_request
from yuan_grpc.server.engine.types import BeamSearchParams, Constraint, Repetition, Sampling
from yuan_grpc.v1 import yuan_pb2 as pb


async def plan(*, loras: Sequence[str] = (), **fields: Any) -> RequestPlan:
    """Return the plan of a request with these fields."""
    engine = FakeEngine()
    engine.loras = list(loras)
    request = pb.GenerateRequest(**({"prompt": "AB"} | fields))
    return plan_request(await parse_request(request, engine), engine)


def test_an_empty_request_gets_the_documented_defaults() -> None:
    assert to_sampling(pb.GenerateRequest(prompt="AB")) == Sampling(
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
    assert to_sampling(request) == Sampling(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("greedy", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_k": 1}, {"top_p": 0.0, "top_k": 1}])
def test_each_parameter_for_the_most_likely_token_is_greedy(greedy: dict[str, float]) -> None:
    request = pb.GenerateRequest(prompt="AB", **greedy)  # type: ignore[arg-type]
    assert to_sampling(request).is_greedy
    assert not to_sampling(pb.GenerateRequest(prompt="AB")).is_greedy


@pytest.mark.parametrize("top_k", [-1, 0])
def test_top_k_minus_one_and_zero_mean_all_tokens(top_k: int) -> None:
    assert to_sampling(pb.GenerateRequest(prompt="AB", top_k=top_k)).top_k == top_k


@pytest.mark.parametrize(
    ("outputs", "constraint"),
    [
        (pb.StructuredOutputs(json="{}"), Constraint("json", "{}")),
        (pb.StructuredOutputs(json_object=True), Constraint("json_object", True)),
        (pb.StructuredOutputs(choice=pb.StringList(values=["a", "b"])), Constraint("choice", ("a", "b"))),
    ],
    ids=["json", "json_object", "choice"],
)
def test_a_constraint_has_a_kind_and_a_specification(outputs: pb.StructuredOutputs, constraint: Constraint) -> None:
    assert to_sampling(pb.GenerateRequest(structured_outputs=outputs)).structured_outputs == constraint


def test_repetition_detection_is_off_unless_given() -> None:
    detection = pb.RepetitionDetection(max_pattern_size=4, min_count=3)
    assert to_sampling(pb.GenerateRequest(repetition_detection=detection)).repetition_detection == Repetition(4, 0, 3)
    assert to_sampling(pb.GenerateRequest()).repetition_detection is None


async def test_best_of_is_n_unless_given() -> None:
    assert (await plan(n=3)).best_of == 3
    sampled = await plan(n=3, best_of=5)
    assert (sampled.best_of, sampled.engine_request.sampling.n, sampled.beam) == (5, 3, None)


async def test_best_of_is_the_width_of_a_beam_search() -> None:
    fields: dict[str, Any] = {"use_beam_search": True, "n": 2, "best_of": 4, "length_penalty": 0, "seed": 1}
    assert (await plan(**fields)).beam == BeamSearchParams(n=2, width=4, length_penalty=0, early_stopping=False)
    searched = await plan(**fields, early_stopping=Value(string_value="never"))
    assert searched.beam is not None
    assert searched.beam.early_stopping == "never"
    sampling = searched.engine_request.sampling
    assert (sampling.n, sampling.seed, sampling.is_greedy) == (1, None, True)


async def test_identical_greedy_choices_are_one_sequence() -> None:
    greedy = await plan(n=3, top_k=1, seed=1)
    assert (greedy.n, greedy.engine_request.sampling.n, greedy.engine_request.sampling.seed) == (3, 1, None)


async def test_a_sampled_request_without_a_seed_gets_one() -> None:
    seeds = {(await plan()).engine_request.sampling.seed for _ in range(2)}
    assert len(seeds - {None}) == 2
    assert (await plan(seed=0)).engine_request.sampling.seed == 0


async def test_the_served_models_name_selects_no_adapter() -> None:
    assert (await plan(model="fake")).engine_request.lora == ""
    assert (await plan(model="style", loras=["style"])).engine_request.lora == "style"


@pytest.mark.parametrize(
    ("fields", "echo"),
    [
        ({"prompt": "AB", "echo": False}, ""),
        ({"prompt": "AB"}, "AB"),
        ({"prompt": "AB", "truncate_prompt_tokens": 2}, "AB"),
        ({"prompt": "AB", "truncate_prompt_tokens": 1}, "B"),
        ({"prompt_token_ids": pb.TokenIds(ids=[67, 68])}, "CD"),
        ({"messages": [pb.Message(role="user", content="A")]}, "A>"),
    ],
    ids=["off", "text", "text that fits", "truncated text", "token ids", "messages"],
)
async def test_the_echo_is_the_truncated_prompt(fields: dict[str, object], echo: str) -> None:
    engine = FakeEngine()
    request = pb.GenerateRequest(**({"echo": True} | fields))  # type: ignore[arg-type]
    assert plan_request(await parse_request(request, engine), engine).echo == echo


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
    ids=["absent", "left", "right", "longer than the prompt", "fit", "fit with max_tokens"],
)
def test_a_long_prompt_is_truncated_on_request(fields: dict[str, int], kept: range) -> None:
    request = pb.GenerateRequest(**fields)  # type: ignore[arg-type]
    prompt = truncate_prompt(request, list(range(100)), to_sampling(request).max_tokens, INFO)
    assert list(prompt) == list(kept)
