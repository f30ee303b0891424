"""What each parameter does, on the real engine behind the real server."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
import pytest
from engine.conftest import Served
from engine.test_generate import SEARCHES
from google.protobuf.duration_pb2 import Duration
from reference import ReferenceYuan

from yuan_grpc.server.engine.types import EngineRequest, FinishReason, Sampling
from yuan_grpc.v1 import yuan_pb2 as pb
from yuan_grpc.v1 import yuan_pb2_grpc

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

PROMPT = "世界上最高的山是什么"
HOT = {"temperature": 2, "seed": 21}


async def one(served: Served, **fields: Any) -> pb.Choice:
    """The only choice."""
    fields = dict[str, Any]({"prompt": PROMPT, "max_tokens": 50}) | fields
    (choice,) = (await served.generate(pb.GenerateRequest(**fields))).choices
    return choice


async def test_a_bias_brings_a_token_about_or_keeps_it_away(served: Served) -> None:
    wanted = served.tokenizer.convert_tokens_to_ids("山")
    assert set((await one(served, logit_bias={wanted: 100})).token_ids) == {wanted}
    hot = await one(served, **HOT)
    most = max(hot.token_ids, key=list(hot.token_ids).count)
    assert most not in (await one(served, **HOT, logit_bias={most: -100})).token_ids


async def test_only_allowed_tokens_come(served: Served) -> None:
    allowed = [served.tokenizer.convert_tokens_to_ids(delta) for delta in ("山", "是", "的")]
    assert set((await one(served, **HOT, allowed_token_ids=allowed)).token_ids) == set(allowed)


@pytest.mark.parametrize("hold", ["min_tokens", "bad_words"])
async def test_some_allowed_token_must_be_left(served: Served, hold: str) -> None:
    delta = served.tokenizer.convert_tokens_to_ids("山")
    held: dict[str, Any] = {"allowed_token_ids": [served.tokenizer.eos_token_id], "min_tokens": 3}
    if hold == "bad_words":
        held = {"allowed_token_ids": [delta], "bad_words": ["山"]}
    with pytest.raises(grpc.aio.AioRpcError, match="`allowed_token_ids` must have one"):
        await one(served, **held)


async def test_bad_words_do_not_come(served: Served) -> None:
    hot = await one(served, **HOT, max_tokens=200, ignore_eos=True)
    deltas = served.tokenizer.convert_ids_to_tokens(hot.token_ids)
    word = next(delta for delta in deltas if len(served.tokenizer.encode(delta.replace("▁", " "))) == 1)
    other = await one(served, **HOT, max_tokens=200, ignore_eos=True, bad_words=[word.replace("▁", "")])
    assert word not in served.tokenizer.convert_ids_to_tokens(other.token_ids)


async def test_nothing_ends_a_choice_before_min_tokens(served: Served) -> None:
    ends = list(range(3, 130))  # bytes, of which a hot model soon makes one
    assert len((await one(served, **HOT, stop_token_ids=ends)).token_ids) < 30
    assert len((await one(served, **HOT, stop_token_ids=ends, min_tokens=30)).token_ids) >= 30


async def test_a_choice_that_repeats_itself_is_ended(served: Served) -> None:
    detection = pb.RepetitionDetection(max_pattern_size=2, min_count=5)
    choice = await one(served, logit_bias={300: 100}, repetition_detection=detection)
    assert choice.finish_reason == pb.FINISH_REASON_REPETITION
    assert 5 <= len(choice.token_ids) < 12
    assert choice.WhichOneof("stopped_by") is None


async def test_the_prompts_logprobs_are_those_of_the_formulas(served: Served) -> None:
    request = pb.GenerateRequest(prompt="def add(a, b):\n    return", max_tokens=1, prompt_logprobs=3)
    response = await served.generate(request)
    first, *rest = response.prompt_logprobs
    ids = [first.token_id, *(position.token_id for position in rest)]
    assert ids == served.tokenizer.encode(request.prompt)
    assert (first.rank, list(first.top)) == (0, [])
    expected = ReferenceYuan(served.demo, len(served.tokenizer)).logprobs(ids)
    for index, position in enumerate(rest):
        assert position.logprob == pytest.approx(float(expected[index, position.token_id]), abs=1e-4)
        assert [top.rank for top in position.top] == [1, 2, 3]
        assert position.top[0].logprob == pytest.approx(float(expected[index].max()), abs=1e-4)


async def test_a_stream_has_the_prompts_logprobs_first(served: Served) -> None:
    request = pb.GenerateRequest(prompt=PROMPT, max_tokens=5, prompt_logprobs=1, flat_logprobs=True, logprobs=1)
    first, *rest = await served.stream(request)
    whole = await served.generate(request)
    assert first.flat_prompt_logprobs == whole.flat_prompt_logprobs
    assert len(first.flat_prompt_logprobs.starts) == whole.usage.prompt_tokens
    assert not any(part.HasField("flat_prompt_logprobs") for part in rest)


async def test_flat_logprobs_are_the_nested_ones(served: Served) -> None:
    nested = await one(served, **HOT, logprobs=4)
    flat = (await one(served, **HOT, logprobs=4, flat_logprobs=True)).flat_logprobs
    starts = [*flat.starts, len(flat.token_ids)]
    for position, start, end in zip(nested.logprobs, starts, starts[1:], strict=False):
        listed = [(position.token_id, position.rank), *((top.token_id, top.rank) for top in position.top)]
        assert list(zip(flat.token_ids[start:end], flat.ranks[start:end], strict=True)) == listed
    assert list(flat.logprobs[:1]) == [nested.logprobs[0].logprob]


async def test_logprobs_of_chosen_tokens_are_those_among_the_likeliest(served: Served) -> None:
    likeliest = await one(served, top_k=1, max_tokens=10, logprobs=20)
    wanted = [top.token_id for top in likeliest.logprobs[0].top[5:8]]
    chosen = await one(served, top_k=1, max_tokens=10, logprob_token_ids=wanted)
    assert [[top.token_id for top in position.top] for position in chosen.logprobs] == [wanted] * 10
    assert [top.logprob for top in chosen.logprobs[0].top] == [top.logprob for top in likeliest.logprobs[0].top[5:8]]
    assert [position.rank for position in chosen.logprobs] == [1] * 10
    assert [top.rank for top in chosen.logprobs[0].top] == [0] * 3


async def test_a_cut_prompt_answers_like_the_short_one(served: Served) -> None:
    ids = served.tokenizer.encode("一二三四五六七八九十" * 20)
    long = pb.TokenIds(ids=ids)
    for side, kept in ((pb.TRUNCATION_SIDE_LEFT, ids[-30:]), (pb.TRUNCATION_SIDE_RIGHT, ids[:30])):
        deadline = await one(
            served, prompt=None, prompt_token_ids=long, truncate_prompt_tokens=30, truncation_side=side, top_k=1
        )
        short = await one(served, prompt=None, prompt_token_ids=pb.TokenIds(ids=kept), top_k=1)
        assert deadline.token_ids == short.token_ids


async def test_a_prompt_that_is_too_long_can_be_made_to_fit(served: Served) -> None:
    request = pb.GenerateRequest(prompt="长" * 5000, truncate_prompt_tokens=-1, max_tokens=100, ignore_eos=True)
    usage = (await served.generate(request)).usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (2048 - 100, 100)


async def test_prefixes_are_shared_within_a_salt_only(served: Served) -> None:
    async def cached(**fields: Any) -> int:
        request = pb.GenerateRequest(prompt="salted prefix " * 40, max_tokens=1, **fields)
        return (await served.generate(request)).usage.cached_tokens

    assert await cached(cache_salt="a") == 0
    assert await cached(cache_salt="b") == 0
    assert await cached(cache_salt="a") > 0
    assert await cached(cache_salt="a", skip_reading_prefix_cache=True) == 0


async def test_the_best_of_several_are_those_with_the_highest_logprob(served: Served) -> None:
    fields: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 20, "seed": 5, "temperature": 1.5}
    every = await served.generate(pb.GenerateRequest(**fields, n=6, logprobs=0))
    request = pb.GenerateRequest(**fields, n=2, best_of=6)
    best = await served.generate(request)
    ranked = sorted(every.choices, key=lambda choice: choice.cumulative_logprob, reverse=True)[:2]
    assert [choice.text for choice in best.choices] == [choice.text for choice in ranked]
    assert [choice.cumulative_logprob for choice in best.choices] == [choice.cumulative_logprob for choice in ranked]
    assert best.usage.completion_tokens == every.usage.completion_tokens
    assert not best.choices[0].logprobs
    parts = await served.stream(request)
    assert parts[-1].choices == best.choices
    assert [part.progress.tokens for part in parts if part.HasField("progress")][-1] == best.usage.completion_tokens


async def test_a_stream_interval_makes_fewer_messages_of_the_same_text(served: Served) -> None:
    often = await served.stream(pb.GenerateRequest(prompt=PROMPT, max_tokens=60, top_k=1, ignore_eos=True))
    seldom = await served.stream(
        pb.GenerateRequest(prompt=PROMPT, max_tokens=60, top_k=1, ignore_eos=True, stream_interval=20)
    )
    assert len(seldom) <= 6 < len(often)
    assert text_of(seldom) == text_of(often)


async def test_who_reads_slowly_gets_fewer_messages_of_the_same_text(served: Served) -> None:
    request = pb.GenerateRequest(prompt=PROMPT, max_tokens=1000, top_k=1, ignore_eos=True, logprobs=20)
    narrow = [("grpc.http2.bdp_probe", 0)]  # so that the way to the client holds 64 KB, and no more
    async with grpc.aio.insecure_channel(served.address, options=narrow) as channel:
        call = yuan_pb2_grpc.YuanServiceStub(channel).GenerateStream(request)
        parts = [await call.read()]
        await served.until_unfinished(0)  # the engine is through with it, and nobody has read
        while (part := await call.read()) is not grpc.aio.EOF:
            parts.append(part)
    assert len(parts) < 500
    tokens = [token_id for part in parts for choice in part.choices for token_id in choice.token_ids]
    assert len(tokens) == 1000
    assert text_of(parts) == (await one(served, max_tokens=1000, top_k=1, ignore_eos=True)).text


async def test_a_heartbeat_comes_while_the_prompt_waits(served: Served) -> None:
    busy = served.stub.GenerateStream(pb.GenerateRequest(prompt=PROMPT, n=8, max_tokens=1500, ignore_eos=True))
    await busy.read()
    await busy.read()
    request = pb.GenerateRequest(prompt=PROMPT, max_tokens=1, heartbeat_interval=Duration(nanos=100_000_000))
    call = served.stub.GenerateStream(request)
    first, beat = await call.read(), await call.read()
    assert (first.HasField("usage"), beat.HasField("usage"), list(beat.choices)) == (True, False, [])
    call.cancel()
    busy.cancel()
    await served.until_unfinished(0)


@SEARCHES
async def test_a_deadline_gives_what_there_is(served: Served, search: dict[str, Any]) -> None:
    request = pb.GenerateRequest(
        prompt=PROMPT, n=3, max_tokens=2000, ignore_eos=True, partial_on_deadline=True, **search
    )

    async def items() -> AsyncIterator[pb.GenerateBatchRequest]:
        yield pb.GenerateBatchRequest(request=request)

    alone = await served.stub.Generate(request, timeout=2)
    (item,) = [item async for item in served.stub.GenerateBatch(items(), timeout=2)]
    for response in (alone, item.response):
        assert [choice.finish_reason for choice in response.choices] == [pb.FINISH_REASON_DEADLINE] * 3
        returned = sum(len(choice.token_ids) for choice in response.choices)
        assert response.usage.completion_tokens >= returned > 0
    parts = [part async for part in served.stub.GenerateStream(request, timeout=2)]
    assert {choice.index for choice in parts[-1].choices if choice.finish_reason} == {0, 1, 2}
    await served.until_unfinished(0)
    assert await served.is_empty()


KEPT_BACK = {"a stop string": {"stop": ["x" * 1000]}, "an interval": {"stream_interval": 2000}}
"""What has the engine keep back what it has generated: until it is no beginning of a stop string, or enough."""


@pytest.mark.parametrize("fields", KEPT_BACK.values(), ids=KEPT_BACK.keys())
async def test_a_deadline_gives_all_that_was_generated(served: Served, fields: dict[str, Any]) -> None:
    greedy: dict[str, Any] = {"prompt": PROMPT, "ignore_eos": True, "top_k": 1}
    request = pb.GenerateRequest(**greedy, **fields, max_tokens=2000, partial_on_deadline=True)
    parts = [part async for part in served.stub.GenerateStream(request, timeout=2)]
    response = await served.stub.Generate(request, timeout=2)
    (choice,) = response.choices
    for text, tokens in ((text_of(parts), parts[-1].usage.completion_tokens), (choice.text, len(choice.token_ids))):
        expected = await served.generate(pb.GenerateRequest(**greedy, max_tokens=tokens))
        assert text == expected.choices[0].text != ""


async def test_a_job_cut_short_while_nobody_reads_ends_with_one_step_of_all_the_rest(served: Served) -> None:
    deadline, sampling = asyncio.Event(), Sampling(n=2, max_tokens=2000, ignore_eos=True, seed=1, logprobs=1)
    engine_request = EngineRequest("cut-short", [5, 6, 7], sampling)
    async with aclosing(served.engine.generate(engine_request, stream=True, deadline=deadline)) as steps:
        before = [await anext(steps) for _ in range(3)]
        deadline.set()
        await served.until_unfinished(0)
        (end,) = [step async for step in steps]
    assert not before[0].deltas
    assert {(delta.index, delta.finish_reason) for delta in end.deltas} == {(i, FinishReason.DEADLINE) for i in (0, 1)}
    assert all(len(delta.logprobs) == len(delta.token_ids) for delta in end.deltas)


@SEARCHES
async def test_an_aborted_call_leaves_nothing_in_the_engine(served: Served, search: dict[str, Any]) -> None:
    request = pb.GenerateRequest(prompt=PROMPT, max_tokens=2000, ignore_eos=True, request_id="to-abort", **search)
    call = served.stub.GenerateStream(request)
    await call.read()
    await call.read()
    await served.stub.Abort(pb.AbortRequest(request_id="to-abort"))
    assert served.unfinished == 0
    await served.until_empty()
    call.cancel()


async def test_a_conversation_is_yuans_own_format(served: Served) -> None:
    messages = [
        pb.Message(role="user", content="你好"),
        pb.Message(role="assistant", content="你好！"),
        pb.Message(role="user", content=PROMPT),
    ]
    by_hand = f"你好<n>你好！<n>{PROMPT}<sep>"
    assert (await one(served, prompt=None, messages=messages, top_k=1)) == (await one(served, prompt=by_hand, top_k=1))
    echoed = await one(served, prompt=None, messages=messages, echo=True)
    assert echoed.text.startswith(by_hand)


async def test_tokens_come_with_their_stretches_of_the_text(served: Served) -> None:
    text = "山 is a mountain<sep>🙂"
    response = await served.stub.Tokenize(pb.TokenizeRequest(prompt=text))
    assert [token.id for token in response.tokens] == served.tokenizer.encode(text)
    assert "<sep>" in [text[token.start : token.end] for token in response.tokens]
    assert response.tokens[-1].end == len(text)
    back = await served.stub.Detokenize(pb.DetokenizeRequest(token_ids=[token.id for token in response.tokens]))
    assert back.text.replace("<sep> ", "<sep>") == text


async def test_the_model_says_what_it_is(served: Served) -> None:
    model = await served.stub.GetModel(pb.GetModelRequest())
    assert (model.name, model.dtype, model.vllm_version) == ("yuan-demo", "float32", "0.32.0")
    assert model.sizes.tokens == len(served.tokenizer)
    assert (model.limits.max_model_len, model.limits.max_logprobs, model.limits.max_num_seqs) == (2048, 20, 2)
    assert model.limits.max_num_queued_reqs == 150
    assert (model.lora.max_lora_rank, model.lora.can_load) == (8, True)


async def test_beam_search_is_the_same_whole_and_streamed(served: Served) -> None:
    request = pb.GenerateRequest(
        prompt=PROMPT, max_tokens=12, n=3, use_beam_search=True, best_of=4, top_k=-1, temperature=0, logprobs=1
    )
    whole, parts = await served.generate(request), await served.stream(request)
    assert parts[-1].choices == whole.choices
    assert [part.progress.tokens for part in parts if part.HasField("progress")] == list(range(1, 13))
    assert parts[-1].usage == whole.usage
    for choice in whole.choices:
        assert sum(p.logprob for p in choice.logprobs) == pytest.approx(choice.cumulative_logprob, abs=1e-4)
    scores = [choice.cumulative_logprob for choice in whole.choices]
    assert scores == sorted(scores, reverse=True)


async def test_a_batch_is_answered_in_full(served: Served) -> None:
    requests = [
        pb.GenerateBatchRequest(request=pb.GenerateRequest(prompt=PROMPT, max_tokens=5, seed=i, temperature=-(i % 2)))
        for i in range(200)
    ]
    answers = [answer async for answer in served.stub.GenerateBatch(iter(requests))]
    assert sorted(answer.index for answer in answers) == list(range(200))
    assert {(a.index % 2 == 1, a.WhichOneof("result")) for a in answers} == {(False, "response"), (True, "error")}


async def test_a_beam_and_a_crowd_do_not_disturb_each_other(served: Served) -> None:
    beam = pb.GenerateRequest(prompt=PROMPT, max_tokens=10, use_beam_search=True, best_of=4)
    plain = pb.GenerateRequest(prompt=PROMPT, max_tokens=40, top_k=1)
    alone = (await served.generate(beam)).choices, (await served.generate(plain)).choices
    together = await asyncio.gather(*[served.generate(request) for request in (beam, plain) * 4])
    assert [response.choices for response in together] == [*alone] * 4


def text_of(parts: list[pb.GenerateStreamResponse]) -> str:
    return "".join(choice.text for part in parts for choice in part.choices)
