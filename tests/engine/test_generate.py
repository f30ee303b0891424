"""Generate and GenerateStream on the real engine: texts, tokens, log-probabilities, and requests that end early."""

import asyncio
import json
import re
import sys
from codecs import getincrementaldecoder
from collections import defaultdict
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest
from engine.conftest import Served

from yuan_grpc.server.engine.types import EngineRequest, Sampling
from yuan_grpc.v1 import yuan_pb2 as pb

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

PROMPT = "世界上最高的山是什么"
CHOICES = 64
# With two sequences at a time this takes minutes, so only cancellation can end it within a test's timeout.
ENDLESS = pb.GenerateRequest(prompt=PROMPT, n=CHOICES, max_tokens=2000, ignore_eos=True)
within_a_minute = pytest.mark.timeout(60)


def join_deltas(messages: list[pb.GenerateStreamResponse]) -> dict[int, pb.Choice]:
    """Concatenate the deltas of a stream by choice."""
    choices: dict[int, pb.Choice] = defaultdict(pb.Choice)
    for message in messages:
        for delta in message.choices:
            text = choices[delta.index].text + delta.text
            choices[delta.index].MergeFrom(delta)
            choices[delta.index].text = text
    return choices


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 1, "top_p": 0},
        {"seed": 1, "logprobs": 3},
        {"seed": 2, "n": 3, "echo": True},
        {"seed": 3, "temperature": 2, "skip_special_tokens": False},
        {"seed": 4, "stop": ["中", " the"], "include_stop_str_in_output": True},
    ],
    ids=["greedy", "logprobs", "choices", "high_temperature", "stop"],
)
async def test_the_concatenated_stream_equals_the_unary_response(served: Served, fields: dict[str, object]) -> None:
    request = pb.GenerateRequest(prompt=PROMPT, max_tokens=100, **fields)  # type: ignore[arg-type]
    response, messages = await served.generate(request), await served.stream(request)
    choices = join_deltas(messages)
    order = list(choices)
    assert list(choices.values()) == sorted(response.choices, key=lambda choice: order.index(choice.index))
    assert messages[-1].usage == response.usage
    assert messages[0].usage == pb.Usage(prompt_tokens=response.usage.prompt_tokens)
    first_deltas = [delta for message in messages[:2] for delta in message.choices]
    assert {delta.finish_reason for delta in first_deltas} == {pb.FINISH_REASON_UNSPECIFIED}


@pytest.mark.parametrize("skip_special_tokens", [True, False])
async def test_a_text_is_its_decoded_tokens_with_every_space(served: Served, skip_special_tokens: bool) -> None:
    request = pb.GenerateRequest(
        prompt=PROMPT, max_tokens=300, seed=5, n=4, temperature=2, skip_special_tokens=skip_special_tokens
    )
    for choice in (await served.generate(request)).choices:
        ids = choice.token_ids[:-1] if choice.stop_token_id else choice.token_ids
        pieces = served.tokenizer.convert_ids_to_tokens(ids, skip_special_tokens)
        text = served.tokenizer.convert_tokens_to_string(pieces)
        assert text.startswith(choice.text)
        assert text.removeprefix(choice.text) in ("", "\ufffd")  # an incomplete character at the end


async def test_each_delta_has_the_characters_that_its_tokens_complete(served: Served) -> None:
    begun = 0xE4 + 3  # the first byte of a Chinese character
    request = pb.GenerateRequest(prompt_token_ids=pb.TokenIds(ids=[begun]), max_tokens=200, seed=6, temperature=1.5)
    decoder = getincrementaldecoder("utf-8")("replace")
    decoder.decode(served.tokenizer.token_bytes(begun))
    for message in (await served.stream(request))[1:]:
        (delta,) = message.choices
        completed = b"".join(served.tokenizer.token_bytes(i, skip_special_tokens=True) for i in delta.token_ids)
        assert delta.text == decoder.decode(completed)


async def test_the_replacement_character_at_the_end_of_a_text_is_returned(served: Served) -> None:
    choices = pb.StructuredOutputs(choice=pb.StringList(values=["a\ufffd"]))
    request = pb.GenerateRequest(prompt=PROMPT, max_tokens=20, structured_outputs=choices)
    assert (await served.generate(request)).choices[0].text == "a\ufffd"


@pytest.mark.parametrize("byte", [0x80, 0xFF])
async def test_bytes_that_no_character_has_become_replacement_characters(served: Served, byte: int) -> None:
    request = pb.GenerateRequest(prompt=PROMPT, max_tokens=50, allowed_token_ids=[byte + 3])
    (choice,) = (await served.generate(request)).choices
    detokenized = await served.stub.Detokenize(pb.DetokenizeRequest(token_ids=choice.token_ids))
    assert choice.text == detokenized.text == "\ufffd" * 50


async def test_a_stop_string_with_the_replacement_character_ends_a_choice_at_once(served: Served) -> None:
    choices = pb.StructuredOutputs(choice=pb.StringList(values=["a\ufffdb"]))
    request = pb.GenerateRequest(prompt=PROMPT, max_tokens=20, structured_outputs=choices, stop=["\ufffd"])
    (choice,) = (await served.generate(request)).choices
    assert (choice.text, choice.stop_string) == ("a", "\ufffd")
    assert choice.token_ids[-1] == 0xBD + 3  # the last byte of U+FFFD


async def test_padding_ids_are_never_sampled_nor_ranked(served: Served) -> None:
    request = pb.GenerateRequest(
        prompt=PROMPT, max_tokens=300, seed=7, n=4, temperature=2, logprobs=20, ignore_eos=True
    )
    vocab_size = len(served.tokenizer)
    for choice in (await served.generate(request)).choices:
        assert max(choice.token_ids) < vocab_size
        assert max(top.token_id for position in choice.logprobs for top in position.top) < vocab_size


async def test_generation_stops_at_the_end_of_text_token(served: Served) -> None:
    bias = {served.tokenizer.eos_token_id: 8.0}  # without it, one of 6,000 tokens is <eod>
    request = pb.GenerateRequest(prompt=PROMPT, max_tokens=200, seed=8, n=4, temperature=2, logit_bias=bias)
    ended = [c for c in (await served.generate(request)).choices if c.finish_reason == pb.FINISH_REASON_STOP]
    assert any(len(choice.token_ids) > 3 for choice in ended)
    for choice in ended:
        assert choice.stop_token_id == choice.token_ids[-1] == served.tokenizer.eos_token_id
        assert served.tokenizer.eos_token_id not in choice.token_ids[:-1]
        assert "<eod>" not in choice.text


@pytest.mark.parametrize("included", [False, True])
async def test_a_stop_string_ends_a_choice(served: Served, included: bool) -> None:
    request = pb.GenerateRequest(prompt=PROMPT, max_tokens=100, seed=9, temperature=2)
    (unstopped,) = (await served.generate(request)).choices
    stop = unstopped.text[20:23]
    request.stop.append(stop)
    request.include_stop_str_in_output = included
    (choice,) = (await served.generate(request)).choices
    before = unstopped.text[: unstopped.text.index(stop)]
    assert choice.text == (before + stop if included else before)
    assert (choice.finish_reason, choice.stop_string) == (pb.FINISH_REASON_STOP, stop)


async def test_a_stop_token_ends_a_choice(served: Served) -> None:
    request = pb.GenerateRequest(prompt=PROMPT, max_tokens=100, seed=10, temperature=2)
    (unstopped,) = (await served.generate(request)).choices
    request.stop_token_ids.append(unstopped.token_ids[30])
    (choice,) = (await served.generate(request)).choices
    end = list(unstopped.token_ids).index(unstopped.token_ids[30])
    assert list(choice.token_ids) == list(unstopped.token_ids[: end + 1])
    assert choice.stop_token_id == unstopped.token_ids[30]


async def test_logprobs_are_ranked_and_add_up(served: Served) -> None:
    request = pb.GenerateRequest(prompt=PROMPT, max_tokens=50, seed=11, logprobs=5)
    (choice,) = (await served.generate(request)).choices
    assert [position.token_id for position in choice.logprobs] == list(choice.token_ids)
    assert sum(position.logprob for position in choice.logprobs) == pytest.approx(choice.cumulative_logprob, abs=1e-4)
    for position in choice.logprobs:
        assert [top.rank for top in position.top] == [1, 2, 3, 4, 5]
        assert sorted((top.logprob for top in position.top), reverse=True) == [top.logprob for top in position.top]
        assert position.rank > 5 or position.token_id in [top.token_id for top in position.top]


async def test_token_texts_keep_their_spaces(served: Served) -> None:
    request = pb.GenerateRequest(prompt=PROMPT, max_tokens=300, seed=12, temperature=2, logprobs=0, ignore_eos=True)
    (choice,) = (await served.generate(request)).choices
    with_space = [p for p in choice.logprobs if served.tokenizer.convert_ids_to_tokens([p.token_id])[0].startswith("▁")]
    assert with_space
    assert all(position.token.startswith(" ") for position in with_space)


async def test_zero_logprobs_return_only_the_chosen_tokens(served: Served) -> None:
    request = pb.GenerateRequest(prompt=PROMPT, max_tokens=5, logprobs=0, ignore_eos=True)
    (choice,) = (await served.generate(request)).choices
    assert [list(position.top) for position in choice.logprobs] == [[]] * 5


async def test_greedy_choices_are_identical_and_all_counted(served: Served) -> None:
    response = await served.generate(pb.GenerateRequest(prompt=PROMPT, n=3, top_p=0))
    assert [choice.index for choice in response.choices] == [0, 1, 2]
    (ids,) = {tuple(choice.token_ids) for choice in response.choices}
    assert response.usage.completion_tokens == 3 * len(ids)


async def test_only_a_seed_makes_sampling_repeatable(served: Served) -> None:
    async def ids(**fields: Any) -> list[tuple[int, ...]]:
        request = pb.GenerateRequest(prompt=PROMPT, max_tokens=50, n=2, **fields)
        return [tuple(choice.token_ids) for choice in (await served.generate(request)).choices]

    assert await ids(seed=13) == await ids(seed=13)
    assert len(set(await ids(seed=13))) == 2
    assert await ids() != await ids()


async def test_a_seed_repeats_after_a_prefill_of_many_steps(served: Served) -> None:
    request = pb.GenerateRequest(prompt="many steps " * 100, max_tokens=20, seed=14, skip_reading_prefix_cache=True)
    first, again = await served.generate(request), await served.generate(request)
    assert first.usage.prompt_tokens > 10 * 48
    assert first.choices == again.choices


async def test_a_seed_drawn_by_the_server_reproduces_the_response(served: Served) -> None:
    request = pb.GenerateRequest(prompt=PROMPT, max_tokens=50, n=2)
    first = await served.generate(request)
    request.seed = first.seed
    assert (await served.generate(request)).choices == first.choices


async def test_batching_does_not_change_the_tokens(served: Served) -> None:
    prompts = [PROMPT, "def add(a, b):", "Write a function" * 20, "一"]
    requests = [pb.GenerateRequest(prompt=prompt, max_tokens=60, top_k=1) for prompt in prompts]
    alone = [await served.generate(request) for request in requests]
    together = await asyncio.gather(*[served.generate(request) for request in requests * 3])
    assert [list(r.choices[0].token_ids) for r in together] == [list(r.choices[0].token_ids) for r in alone] * 3


async def test_an_invalid_request_does_not_affect_the_others(served: Served) -> None:
    good = pb.GenerateRequest(prompt=PROMPT, max_tokens=60, top_k=1)
    expected = await served.generate(good)
    bad = [pb.GenerateRequest(prompt=PROMPT, top_p=-1), pb.GenerateRequest(), pb.GenerateRequest(prompt="x" * 200_000)]
    calls = [served.generate(request) for request in (good, *bad, good)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    codes = [result.code() for result in results if isinstance(result, grpc.aio.AioRpcError)]
    assert codes == [grpc.StatusCode.INVALID_ARGUMENT] * 3
    completed = [result.choices for result in results if isinstance(result, pb.GenerateResponse)]
    assert completed == [expected.choices] * 2


async def test_a_repeated_prompt_hits_the_prefix_cache(served: Served) -> None:
    request = pb.GenerateRequest(prompt="from the cache " * 40, max_tokens=1, cache_salt="mine")
    first, again = await served.generate(request), await served.generate(request)
    assert first.usage.cached_tokens == 0
    assert 0 < again.usage.cached_tokens < again.usage.prompt_tokens


async def test_generation_ends_at_the_context_limit(served: Served) -> None:
    request = pb.GenerateRequest(prompt_token_ids=pb.TokenIds(ids=[5] * 2040), max_tokens=100, ignore_eos=True)
    response = await served.generate(request)
    assert response.usage.completion_tokens == 8
    assert response.choices[0].finish_reason == pb.FINISH_REASON_LENGTH


async def test_a_body_of_yuans_http_interface_works_unchanged(served: Served, buf: str) -> None:
    body = {"prompt": PROMPT, "max_tokens": 32, "temperature": 1, "top_p": 0, "top_k": 1, "stop": ["<eod>"]}
    body |= {"use_beam_search": False, "stream": False}
    texts = []
    for method in ("Generate", "GenerateStream"):
        process = await asyncio.create_subprocess_exec(
            *(buf, "curl", "--protocol", "grpc", "--http2-prior-knowledge", "-d", json.dumps(body)),
            f"http://{served.address}/yuan.v1.YuanService/{method}",
            stdout=asyncio.subprocess.PIPE,
        )
        output, _ = await process.communicate()
        assert process.returncode == 0
        decoder, text, remaining = json.JSONDecoder(), "", output.decode().strip()
        while remaining:
            message, end = decoder.raw_decode(remaining)
            text += "".join(choice.get("text", "") for choice in message.get("choices", []))
            remaining = remaining[end:].strip()
        texts.append(text)
    assert texts[0] == texts[1] != ""


async def test_the_quickstart_prints_the_same_text_twice(served: Served) -> None:
    program = Path(__file__).parents[2] / "clients" / "quickstart.py"
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(program), served.address, "一", stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    text = output.decode()
    assert text == text[: len(text) // 2] * 2 != ""


async def test_the_readmes_program_prints_text(served: Served) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    (program,) = re.findall("^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program.replace("127.0.0.1:50051", served.address)), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    assert output.decode()


@within_a_minute
async def test_a_request_cancelled_while_decoding_is_freed(served: Served) -> None:
    call = served.stub.GenerateStream(ENDLESS)
    await call.read()  # the request was accepted
    await call.read()
    call.cancel()
    await assert_freed(served)


@within_a_minute
async def test_a_request_cancelled_while_prefilling_is_freed(served: Served) -> None:
    request = pb.GenerateRequest(prompt_token_ids=pb.TokenIds(ids=range(3, 1003)), n=CHOICES, max_tokens=1000)
    call = served.stub.Generate(request)
    await served.wait_for_unfinished(CHOICES)
    call.cancel()
    await assert_freed(served)


async def run_on_engine(served: Served) -> None:
    """Run a request without the service."""
    outputs = served.engine.generate(EngineRequest("queued", [3], Sampling()), stream=True)
    async with aclosing(outputs):
        async for _ in outputs:
            pass


@within_a_minute
async def test_a_request_cancelled_in_the_queue_is_freed_while_others_run(served: Served) -> None:
    running = served.stub.GenerateStream(ENDLESS)
    await running.read()
    queued = asyncio.ensure_future(run_on_engine(served))  # calls wait for their turns before the engine has them
    await served.wait_for_unfinished(CHOICES + 1)
    queued.cancel()
    await served.wait_for_unfinished(CHOICES)
    await running.read()
    await running.read()  # it continues
    running.cancel()
    await assert_freed(served)


@within_a_minute
async def test_a_request_cancelled_while_entering_the_queue_is_freed(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    core, added = served.llm.engine_core, asyncio.Event()
    add_request = core.add_request_async

    async def add_and_hang(request: object) -> None:
        await add_request(request)
        added.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(core, "add_request_async", add_and_hang)
    # One choice, because vLLM itself aborts several. Its 2,000 tokens take longer than the timeout below.
    call = served.stub.Generate(pb.GenerateRequest(prompt=PROMPT, max_tokens=2000, ignore_eos=True))
    await added.wait()
    call.cancel()
    await asyncio.wait_for(assert_freed(served), timeout=2)


@within_a_minute
async def test_a_full_engine_rejects_a_request_and_continues(served: Served) -> None:
    running = served.stub.GenerateStream(ENDLESS)
    await running.read()
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await served.stub.Generate(pb.GenerateRequest(prompt=PROMPT, n=128))
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await running.read()
    await running.read()
    running.cancel()
    await assert_freed(served)


SEARCHES = pytest.mark.parametrize(
    "search", [{}, {"use_beam_search": True, "best_of": 4}, {"best_of": 4}], ids=["sampled", "beam", "best_of"]
)


@within_a_minute
@SEARCHES
async def test_a_request_past_its_deadline_is_freed(served: Served, search: dict[str, Any]) -> None:
    request = pb.GenerateRequest(prompt=PROMPT, max_tokens=2000, ignore_eos=True, **search)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await served.stub.Generate(request, timeout=0.5)
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await assert_freed(served)


async def assert_freed(served: Served) -> None:
    """Check that no request is left in the front end or in the engine core's cache."""
    await served.wait_for_unfinished(0)
    assert not served.llm.output_processor.parent_requests
    assert await served.is_empty()
