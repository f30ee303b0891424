"""Constrained texts: each satisfies its constraint to the letter, whatever the tokens are."""

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


async def sampled(served: Served, outputs: pb.StructuredOutputs, times: int, max_tokens: int = 120) -> list[pb.Choice]:
    """So many choices of a hot model, so that a random one tries all that is allowed. Nothing is hidden."""
    request = pb.GenerateRequest(
        prompt=PROMPT,
        n=times,
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
    ids=["regex", "spaces", "bytes", "special", "lines", "choice", "grammar", "structural_tag"],
)
async def test_a_text_fulfils_its_constraint(served: Served, outputs: pb.StructuredOutputs, pattern: str) -> None:
    for choice in await sampled(served, outputs, times=4):
        assert choice.finish_reason == pb.FINISH_REASON_STOP
        assert re.fullmatch(pattern, choice.text)


@pytest.mark.parametrize(
    "outputs",
    [pb.StructuredOutputs(json=json.dumps(SCHEMA)), pb.StructuredOutputs(json_object=True)],
    ids=["schema", "object"],
)
async def test_json_is_what_its_schema_says(served: Served, outputs: pb.StructuredOutputs) -> None:
    choices = await sampled(served, outputs, times=12, max_tokens=300)
    texts = [choice.text for choice in choices if choice.finish_reason == pb.FINISH_REASON_STOP]
    assert texts  # a random model may well go on with spaces
    for text in texts:
        found = json.loads(text)
        assert isinstance(found, dict)
        if outputs.json:
            assert (found["city"] in ("北京", "上海"), type(found["large"]), len(found)) == (True, bool, 2)


async def test_special_tokens_are_never_taken_for_text(served: Served) -> None:
    tokenizer = served.tokenizer
    special = set(tokenizer.convert_tokens_to_ids([*SPECIAL, *HIDDEN])) - {tokenizer.eos_token_id}
    choices = await sampled(served, pb.StructuredOutputs(regex="(.|\n)*"), times=4, max_tokens=300)
    taken = {token_id for choice in choices for token_id in choice.token_ids}
    assert len(taken) > 150
    assert not taken & special
    assert max(taken) < len(tokenizer)


@pytest.mark.parametrize(
    "outputs",
    [
        pb.StructuredOutputs(regex="("),
        pb.StructuredOutputs(regex=r"[^\s\S]"),
        pb.StructuredOutputs(regex="((a{0,100}){0,100}){0,100}"),
        pb.StructuredOutputs(json="{"),
        pb.StructuredOutputs(json="null"),
        pb.StructuredOutputs(grammar="root ::="),
        pb.StructuredOutputs(grammar="root ::= root"),
        pb.StructuredOutputs(structural_tag='{"type": "structural_tag"}'),
    ],
    ids=["broken", "never", "slow", "no json", "no schema", "no grammar", "circle", "no tag"],
)
async def test_a_bad_constraint_is_told_and_harms_nobody(served: Served, outputs: pb.StructuredOutputs) -> None:
    plain = pb.GenerateRequest(prompt=PROMPT, max_tokens=40, top_k=1)
    expected = await served.generate(plain)
    goes_on = {served.tokenizer.eos_token_id: -100}
    bad = pb.GenerateRequest(prompt=PROMPT, max_tokens=2000, structured_outputs=outputs, logit_bias=goes_on)
    refusal, answer = await asyncio.gather(served.generate(bad), served.generate(plain), return_exceptions=True)
    assert isinstance(refusal, grpc.aio.AioRpcError)
    assert refusal.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"structured_outputs.{outputs.WhichOneof('constraint')}" in (refusal.details() or "")
    assert isinstance(answer, pb.GenerateResponse)
    assert answer.choices == expected.choices
    await served.until_empty()
