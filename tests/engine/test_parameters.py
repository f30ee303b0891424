"""The effect of each parameter, on the real engine and server."""

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

from yuan_grpc.server.core.generation_service import GenerationService
from yuan_grpc.server.engine.types import EngineRequest, FinishReason, Sampling
from yuan_grpc.v1 import yuan_pb2 as pb
from yuan_grpc.v1 import yuan_pb2_grpc

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

PROMPT = "世界上最高的山是什么"
HOT = {"temperature": 2, "seed": 21}


async def generate_one(served: Served, **fields: Any) -> pb.Choice:
    """Generate and return the only choice."""
    fields = dict[str, Any]({"prompt": PROMPT, "max_tokens": 50}) | fields
    (choice,) = (await served.generate(pb.GenerateRequest(**fields))).choices
    return choice


async def test_a_logit_bias_forces_or_excludes_a_token(served: Served) -> None:
    wanted = served.tokenizer.convert_tokens_to_ids("山")
    assert set((await generate_one(served, logit_bias={wanted: 100})).token_ids) == {wanted}
    hot = await generate_one(served, **HOT)
    most_common = max(hot.token_ids, key=list(hot.token_ids).count)
    assert most_common not in (await generate_one(served, **HOT, logit_bias={most_common: -100})).token_ids


async def test_only_allowed_tokens_are_sampled(served: Served) -> None:
    allowed = [served.tokenizer.convert_tokens_to_ids(piece) for piece in ("山", "是", "的")]
    assert set((await generate_one(served, **HOT, allowed_token_ids=allowed)).token_ids) == set(allowed)


@pytest.mark.parametrize("constraint", ["min_tokens", "bad_words"])
async def test_other_constraints_must_leave_an_allowed_token(served: Served, constraint: str) -> None:
    token_id = served.tokenizer.convert_tokens_to_ids("山")
    fields: dict[str, Any] = {"allowed_token_ids": [served.tokenizer.eos_token_id], "min_tokens": 3}
    if constraint == "bad_words":
        fields = {"allowed_token_ids": [token_id], "bad_words": ["山"]}
    with pytest.raises(grpc.aio.AioRpcError, match="`bad_words` and `min_tokens` must not exclude every token in"):
        await generate_one(served, **fields)


async def test_bad_words_are_not_generated(served: Served) -> None:
    hot = await generate_one(served, **HOT, max_tokens=200, ignore_eos=True)
    pieces = served.tokenizer.convert_ids_to_tokens(hot.token_ids)
    word = next(piece for piece in pieces if len(served.tokenizer.encode(piece.replace("▁", " "))) == 1)
    other = await generate_one(served, **HOT, max_tokens=200, ignore_eos=True, bad_words=[word.replace("▁", "")])
    assert word not in served.tokenizer.convert_ids_to_tokens(other.token_ids)


async def test_no_choice_ends_before_min_tokens(served: Served) -> None:
    byte_tokens = list(range(3, 130))  # likely to be sampled soon at a high temperature
    assert len((await generate_one(served, **HOT, stop_token_ids=byte_tokens)).token_ids) < 30
    assert len((await generate_one(served, **HOT, stop_token_ids=byte_tokens, min_tokens=30)).token_ids) >= 30


async def test_repetition_detection_ends_a_choice(served: Served) -> None:
    detection = pb.RepetitionDetection(max_pattern_size=2, min_count=5)
    choice = await generate_one(served, logit_bias={300: 100}, repetition_detection=detection)
    assert choice.finish_reason == pb.FINISH_REASON_REPETITION
    assert 5 <= len(choice.token_ids) < 12
    assert choice.WhichOneof("stopped_by") is None


async def test_prompt_logprobs_match_the_reference(served: Served) -> None:
    request = pb.GenerateRequest(prompt="def add(a, b):\n    return", max_tokens=1, prompt_logprobs=3)
    response = await served.generate(request)
    first, *following = response.prompt_logprobs
    ids = [first.token_id, *(position.token_id for position in following)]
    assert ids == served.tokenizer.encode(request.prompt)
    assert (first.rank, list(first.top)) == (0, [])
    expected = ReferenceYuan(served.demo, len(served.tokenizer)).logprobs(ids)
    for index, position in enumerate(following):
        assert position.logprob == pytest.approx(float(expected[index, position.token_id]), abs=1e-4)
        assert [top.rank for top in position.top] == [1, 2, 3]
        assert position.top[0].logprob == pytest.approx(float(expected[index].max()), abs=1e-4)


async def test_a_stream_sends_prompt_logprobs_first(served: Served) -> None:
    request = pb.GenerateRequest(prompt=PROMPT, max_tokens=5, prompt_logprobs=1, flat_logprobs=True, logprobs=1)
    first, *following = await served.stream(request)
    response = await served.generate(request)
    assert first.flat_prompt_logprobs == response.flat_prompt_logprobs
    assert len(first.flat_prompt_logprobs.starts) == response.usage.prompt_tokens
    assert not any(message.HasField("flat_prompt_logprobs") for message in following)


async def test_flat_logprobs_equal_the_nested_ones(served: Served) -> None:
    nested = await generate_one(served, **HOT, logprobs=4)
    flat = (await generate_one(served, **HOT, logprobs=4, flat_logprobs=True)).flat_logprobs
    starts = [*flat.starts, len(flat.token_ids)]
    for position, start, end in zip(nested.logprobs, starts, starts[1:], strict=False):
        entries = [(position.token_id, position.rank), *((top.token_id, top.rank) for top in position.top)]
        assert list(zip(flat.token_ids[start:end], flat.ranks[start:end], strict=True)) == entries
    assert list(flat.logprobs[:1]) == [nested.logprobs[0].logprob]


async def test_logprobs_of_requested_tokens_equal_those_of_the_top_list(served: Served) -> None:
    ranked = await generate_one(served, top_k=1, max_tokens=10, logprobs=20)
    requested = [top.token_id for top in ranked.logprobs[0].top[5:8]]
    chosen = await generate_one(served, top_k=1, max_tokens=10, logprob_token_ids=requested)
    assert [[top.token_id for top in position.top] for position in chosen.logprobs] == [requested] * 10
    assert [top.logprob for top in chosen.logprobs[0].top] == [top.logprob for top in ranked.logprobs[0].top[5:8]]
    assert [position.rank for position in chosen.logprobs] == [1] * 10
    assert [top.rank for top in chosen.logprobs[0].top] == [0] * 3


async def test_a_truncated_prompt_equals_the_short_prompt(served: Served) -> None:
    ids = served.tokenizer.encode("一二三四五六七八九十" * 20)
    long = pb.TokenIds(ids=ids)
    for side, expected in ((pb.TRUNCATION_SIDE_LEFT, ids[-30:]), (pb.TRUNCATION_SIDE_RIGHT, ids[:30])):
        truncated = await generate_one(
            served, prompt=None, prompt_token_ids=long, truncate_prompt_tokens=30, truncation_side=side, top_k=1
        )
        short = await generate_one(served, prompt=None, prompt_token_ids=pb.TokenIds(ids=expected), top_k=1)
        assert truncated.token_ids == short.token_ids


async def test_a_prompt_that_is_too_long_can_be_truncated_to_fit(served: Served) -> None:
    request = pb.GenerateRequest(prompt="长" * 5000, truncate_prompt_tokens=-1, max_tokens=100, ignore_eos=True)
    usage = (await served.generate(request)).usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (2048 - 100, 100)


async def test_prefixes_are_shared_only_within_a_cache_salt(served: Served) -> None:
    async def cached(**fields: Any) -> int:
        request = pb.GenerateRequest(prompt="salted prefix " * 40, max_tokens=1, **fields)
        return (await served.generate(request)).usage.cached_tokens

    assert await cached(cache_salt="a") == 0
    assert await cached(cache_salt="b") == 0
    assert await cached(cache_salt="a") > 0
    assert await cached(cache_salt="a", skip_reading_prefix_cache=True) == 0


async def test_best_of_returns_the_choices_with_the_highest_logprobs(served: Served) -> None:
    fields: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 20, "seed": 5, "temperature": 1.5}
    all_choices = await served.generate(pb.GenerateRequest(**fields, n=6, logprobs=0))
    request = pb.GenerateRequest(**fields, n=2, best_of=6)
    best = await served.generate(request)
    ranked = sorted(all_choices.choices, key=lambda choice: choice.cumulative_logprob, reverse=True)[:2]
    assert [choice.text for choice in best.choices] == [choice.text for choice in ranked]
    assert [choice.cumulative_logprob for choice in best.choices] == [choice.cumulative_logprob for choice in ranked]
    assert best.usage.completion_tokens == all_choices.usage.completion_tokens
    assert not best.choices[0].logprobs
    messages = await served.stream(request)
    assert messages[-1].choices == best.choices
    progress = [message.progress.tokens for message in messages if message.HasField("progress")]
    assert progress[-1] == best.usage.completion_tokens


async def test_a_stream_interval_sends_the_same_text_in_fewer_messages(served: Served) -> None:
    many = await served.stream(pb.GenerateRequest(prompt=PROMPT, max_tokens=60, top_k=1, ignore_eos=True))
    few = await served.stream(
        pb.GenerateRequest(prompt=PROMPT, max_tokens=60, top_k=1, ignore_eos=True, stream_interval=20)
    )
    assert len(few) <= 6 < len(many)
    assert text_of(few) == text_of(many)


async def test_a_slow_reader_receives_the_same_text_in_fewer_messages(served: Served) -> None:
    request = pb.GenerateRequest(prompt=PROMPT, max_tokens=500, top_k=1, ignore_eos=True, logprobs=20)
    options = [("grpc.http2.bdp_probe", 0)]  # limits the flow-control window to 64 KB
    async with grpc.aio.insecure_channel(served.address, options=options) as channel:
        call = yuan_pb2_grpc.YuanServiceStub(channel).GenerateStream(request)
        messages = [await call.read()]
        await served.wait_for_unfinished(0)  # the engine has finished before anything was read
        while (message := await call.read()) is not grpc.aio.EOF:
            messages.append(message)
    assert len(messages) < 250
    tokens = [token_id for message in messages for choice in message.choices for token_id in choice.token_ids]
    assert len(tokens) == 500
    assert text_of(messages) == (await generate_one(served, max_tokens=500, top_k=1, ignore_eos=True)).text


async def test_the_tokens_of_a_message_interval_are_one_message(served: Served) -> None:
    service = GenerationService(served.engine, message_interval=0.5)
    request = pb.GenerateRequest(prompt=PROMPT, max_tokens=100, n=2, temperature=1, seed=3, ignore_eos=True)
    expected = await served.generate(request)
    async with service.stream(request) as stream:
        messages = [message async for message in stream]
    assert len(messages) < 100
    for choice in expected.choices:
        parts = [part for message in messages for part in message.choices if part.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        assert [token_id for part in parts for token_id in part.token_ids] == choice.token_ids


async def test_a_heartbeat_is_sent_while_the_request_waits(served: Served) -> None:
    busy = served.stub.GenerateStream(pb.GenerateRequest(prompt=PROMPT, n=8, max_tokens=1500, ignore_eos=True))
    await busy.read()
    await busy.read()
    request = pb.GenerateRequest(prompt=PROMPT, max_tokens=1, heartbeat_interval=Duration(nanos=100_000_000))
    call = served.stub.GenerateStream(request)
    first, heartbeat = await call.read(), await call.read()
    assert (first.HasField("usage"), heartbeat.HasField("usage"), list(heartbeat.choices)) == (True, False, [])
    call.cancel()
    busy.cancel()
    await served.wait_for_unfinished(0)


@SEARCHES
async def test_a_deadline_returns_partial_output(served: Served, search: dict[str, Any]) -> None:
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
    messages = [message async for message in served.stub.GenerateStream(request, timeout=2)]
    assert {choice.index for choice in messages[-1].choices if choice.finish_reason} == {0, 1, 2}
    await served.wait_for_unfinished(0)
    assert await served.is_empty()


BUFFERED = {"stop": {"stop": ["x" * 1000]}, "stream_interval": {"stream_interval": 2000}}
"""Parameters that make the engine buffer text: a possible beginning of a stop string, or a long interval."""


@pytest.mark.parametrize("fields", BUFFERED.values(), ids=BUFFERED.keys())
async def test_a_deadline_returns_all_generated_text(served: Served, fields: dict[str, Any]) -> None:
    greedy: dict[str, Any] = {"prompt": PROMPT, "ignore_eos": True, "top_k": 1}
    request = pb.GenerateRequest(**greedy, **fields, max_tokens=2000, partial_on_deadline=True)
    messages = [message async for message in served.stub.GenerateStream(request, timeout=2)]
    response = await served.stub.Generate(request, timeout=2)
    (choice,) = response.choices
    for text, tokens in (
        (text_of(messages), messages[-1].usage.completion_tokens),
        (choice.text, len(choice.token_ids)),
    ):
        expected = await served.generate(pb.GenerateRequest(**greedy, max_tokens=tokens))
        assert text == expected.choices[0].text != ""


async def test_a_deadline_while_nothing_is_read_ends_with_one_step_of_all_remaining_output(served: Served) -> None:
    deadline, sampling = asyncio.Event(), Sampling(n=2, max_tokens=2000, ignore_eos=True, seed=1, logprobs=1)
    engine_request = EngineRequest("deadline", [5, 6, 7], sampling)
    async with aclosing(served.engine.generate(engine_request, stream=True, deadline=deadline)) as steps:
        first, *_ = [await anext(steps) for _ in range(3)]
        deadline.set()
        await served.wait_for_unfinished(0)
        (last,) = [step async for step in steps]
    assert not first.deltas
    assert {(delta.index, delta.finish_reason) for delta in last.deltas} == {(i, FinishReason.DEADLINE) for i in (0, 1)}
    assert all(len(delta.logprobs) == len(delta.token_ids) for delta in last.deltas)


@SEARCHES
async def test_an_aborted_call_is_freed_in_the_engine(served: Served, search: dict[str, Any]) -> None:
    request = pb.GenerateRequest(prompt=PROMPT, max_tokens=2000, ignore_eos=True, request_id="to-abort", **search)
    call = served.stub.GenerateStream(request)
    await call.read()
    await call.read()
    await served.stub.Abort(pb.AbortRequest(request_id="to-abort"))
    assert served.unfinished == 0
    await served.wait_until_empty()
    call.cancel()


async def test_a_conversation_uses_yuans_prompt_format(served: Served) -> None:
    messages = [
        pb.Message(role="user", content="你好"),
        pb.Message(role="assistant", content="你好！"),
        pb.Message(role="user", content=PROMPT),
    ]
    prompt = f"你好<n>你好！<n>{PROMPT}<sep>"
    assert (await generate_one(served, prompt=None, messages=messages, top_k=1)) == (
        await generate_one(served, prompt=prompt, top_k=1)
    )
    echoed = await generate_one(served, prompt=None, messages=messages, echo=True)
    assert echoed.text.startswith(prompt)


async def test_tokens_have_their_offsets_in_the_text(served: Served) -> None:
    text = "山 is a mountain<sep>🙂"
    response = await served.stub.Tokenize(pb.TokenizeRequest(prompt=text))
    assert [token.id for token in response.tokens] == served.tokenizer.encode(text)
    assert "<sep>" in [text[token.start : token.end] for token in response.tokens]
    assert response.tokens[-1].end == len(text)
    back = await served.stub.Detokenize(pb.DetokenizeRequest(token_ids=[token.id for token in response.tokens]))
    assert back.text.replace("<sep> ", "<sep>") == text


async def test_get_model_describes_the_model(served: Served) -> None:
    model = await served.stub.GetModel(pb.GetModelRequest())
    assert (model.name, model.dtype, model.vllm_version) == ("yuan-demo", "float32", "0.32.0")
    assert model.sizes.tokens == len(served.tokenizer)
    assert (model.limits.max_model_len, model.limits.max_logprobs, model.limits.max_num_seqs) == (2048, 20, 2)
    assert model.limits.max_num_queued_reqs == 150
    assert (model.lora.max_lora_rank, model.lora.can_load) == (8, True)


async def test_beam_search_gives_the_same_result_streamed(served: Served) -> None:
    request = pb.GenerateRequest(
        prompt=PROMPT, max_tokens=12, n=3, use_beam_search=True, best_of=4, top_k=-1, temperature=0, logprobs=1
    )
    response, messages = await served.generate(request), await served.stream(request)
    assert messages[-1].choices == response.choices
    assert [message.progress.tokens for message in messages if message.HasField("progress")] == list(range(1, 13))
    assert messages[-1].usage == response.usage
    for choice in response.choices:
        assert sum(p.logprob for p in choice.logprobs) == pytest.approx(choice.cumulative_logprob, abs=1e-4)
    scores = [choice.cumulative_logprob for choice in response.choices]
    assert scores == sorted(scores, reverse=True)


async def test_every_request_of_a_batch_gets_a_response(served: Served) -> None:
    requests = [
        pb.GenerateBatchRequest(request=pb.GenerateRequest(prompt=PROMPT, max_tokens=5, seed=i, temperature=-(i % 2)))
        for i in range(200)
    ]
    responses = [response async for response in served.stub.GenerateBatch(iter(requests))]
    assert sorted(response.index for response in responses) == list(range(200))
    assert {(r.index % 2 == 1, r.WhichOneof("result")) for r in responses} == {(False, "response"), (True, "error")}


async def test_beam_search_and_concurrent_requests_do_not_affect_each_other(served: Served) -> None:
    beam = pb.GenerateRequest(prompt=PROMPT, max_tokens=10, use_beam_search=True, best_of=4)
    plain = pb.GenerateRequest(prompt=PROMPT, max_tokens=40, top_k=1)
    alone = (await served.generate(beam)).choices, (await served.generate(plain)).choices
    together = await asyncio.gather(*[served.generate(request) for request in (beam, plain) * 4])
    assert [response.choices for response in together] == [*alone] * 4


def text_of(messages: list[pb.GenerateStreamResponse]) -> str:
    return "".join(choice.text for message in messages for choice in message.choices)
