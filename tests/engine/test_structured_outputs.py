"""Structured outputs: every generated text satisfies its constraint exactly."""

import asyncio
import json
import re

import grpc
import pytest
from engine.conftest import Served

from yuan_grpc.model.tokenizer import HIDDEN, SPECIAL
from yuan_grpc.v1 import yuan_pb2 as pb

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

PROMPT = "世界上最高的山是什么"
CHOICES = ["北京市", " hello  world", "😀!", "<eod>", "line\nbreak"]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["北京", "上海"]}, "large": {"type": "boolean"}},
    "required": ["city", "large"],
    "additionalProperties": False,
}
TAG = {
    "type": "structural_tag",
    "format": {"type": "tag", "begin": "<a>", "content": {"type": "regex", "pattern": "[01]{4}"}, "end": "</a>"},
}

UNENFORCED_TAG = {
    "type": "structural_tag",
    "format": {"type": "json_schema", "json_schema": {"type": "array", "contains": {"const": 1}}},
}


async def sample(served: Served, outputs: pb.StructuredOutputs, n: int, max_tokens: int = 120) -> list[pb.Choice]:
    """Sample `n` choices at a high temperature, so that many allowed tokens are tried. No special token is skipped."""
    request = pb.GenerateRequest(
        prompt=PROMPT,
        n=n,
        seed=1,
        temperature=1.5,
        max_tokens=max_tokens,
        structured_outputs=outputs,
        skip_special_tokens=False,
    )
    return list((await served.generate(request)).choices)


@pytest.mark.parametrize(
    ("outputs", "pattern"),
    [
        (pb.StructuredOutputs(regex=r"[0-9]{3}-[a-z]{4}"), r"[0-9]{3}-[a-z]{4}"),
        (pb.StructuredOutputs(regex=" {2}[a-c]{2} d e"), " {2}[a-c]{2} d e"),
        (pb.StructuredOutputs(regex="[世界霥]{3}[😀-🙏]{2}"), "[世界霥]{3}[😀-🙏]{2}"),
        (pb.StructuredOutputs(regex="<sep>[ab]{3}</s>"), "<sep>[ab]{3}</s>"),
        (pb.StructuredOutputs(regex="[ab]{2}\n\t"), "[ab]{2}\n\t"),
        (pb.StructuredOutputs(choice=pb.StringList(values=CHOICES)), "|".join(map(re.escape, CHOICES))),
        (pb.StructuredOutputs(grammar='root ::= "SELECT " [a-z]{3} " FROM " ("x" | "y")'), "SELECT [a-z]{3} FROM [xy]"),
        (pb.StructuredOutputs(structural_tag=json.dumps(TAG)), "<a>[01]{4}</a>"),
    ],
    ids=["regex", "spaces", "bytes", "special_tokens", "newline", "choice", "grammar", "structural_tag"],
)
async def test_a_text_satisfies_its_constraint(served: Served, outputs: pb.StructuredOutputs, pattern: str) -> None:
    for choice in await sample(served, outputs, n=4):
        assert choice.finish_reason == pb.FINISH_REASON_STOP
        assert re.fullmatch(pattern, choice.text)


@pytest.mark.parametrize(
    "outputs",
    [pb.StructuredOutputs(json=json.dumps(SCHEMA)), pb.StructuredOutputs(json_object=True)],
    ids=["schema", "object"],
)
async def test_json_matches_its_schema(served: Served, outputs: pb.StructuredOutputs) -> None:
    choices = await sample(served, outputs, n=12, max_tokens=300)
    texts = [choice.text for choice in choices if choice.finish_reason == pb.FINISH_REASON_STOP]
    assert texts  # a random model may generate spaces until max_tokens
    for text in texts:
        value = json.loads(text)
        assert isinstance(value, dict)
        if outputs.json:
            assert (value["city"] in ("北京", "上海"), type(value["large"]), len(value)) == (True, bool, 2)


async def test_special_tokens_are_never_sampled_as_text(served: Served) -> None:
    tokenizer = served.tokenizer
    special = set(tokenizer.convert_tokens_to_ids([*SPECIAL, *HIDDEN])) - {tokenizer.eos_token_id}
    choices = await sample(served, pb.StructuredOutputs(regex="(.|\n)*"), n=4, max_tokens=300)
    sampled = {token_id for choice in choices for token_id in choice.token_ids}
    assert len(sampled) > 150
    assert not sampled & special
    assert max(sampled) < len(tokenizer)


@pytest.mark.parametrize(
    "outputs",
    [
        pb.StructuredOutputs(regex="("),
        pb.StructuredOutputs(regex=r"[^\s\S]"),
        pb.StructuredOutputs(regex="((a{0,100}){0,100}){0,100}"),
        pb.StructuredOutputs(json="{"),
        pb.StructuredOutputs(json="null"),
        pb.StructuredOutputs(json='{"type": "array", "contains": {"const": 1}}'),
        pb.StructuredOutputs(regex="a$b"),
        pb.StructuredOutputs(grammar="start: /a$b/"),
        pb.StructuredOutputs(structural_tag=json.dumps(UNENFORCED_TAG)),
        pb.StructuredOutputs(grammar="root ::="),
        pb.StructuredOutputs(grammar="root ::= root"),
        pb.StructuredOutputs(structural_tag='{"type": "structural_tag"}'),
    ],
    ids=[
        "syntax",
        "unmatchable",
        "slow",
        "no_json",
        "no_schema",
        "contains",
        "anchor",
        "lark_anchor",
        "contains_in_tag",
        "no_grammar",
        "recursive",
        "no_tag",
    ],
)
async def test_an_invalid_constraint_is_rejected_and_does_not_affect_others(
    served: Served, outputs: pb.StructuredOutputs
) -> None:
    valid = pb.GenerateRequest(prompt=PROMPT, max_tokens=40, top_k=1)
    expected = await served.generate(valid)
    no_eos = {served.tokenizer.eos_token_id: -100}
    invalid = pb.GenerateRequest(prompt=PROMPT, max_tokens=2000, structured_outputs=outputs, logit_bias=no_eos)
    error, response = await asyncio.gather(served.generate(invalid), served.generate(valid), return_exceptions=True)
    assert isinstance(error, grpc.aio.AioRpcError)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"structured_outputs.{outputs.WhichOneof('constraint')}" in (error.details() or "")
    for part in ("contains", "anchor $"):
        assert (part in (error.details() or "")) == (part.removeprefix("anchor ") in str(outputs))
    assert isinstance(response, pb.GenerateResponse)
    assert response.choices == expected.choices
    await served.wait_until_empty()
