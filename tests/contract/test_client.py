"""The client against the real service with an engine by hand: calls, streams, many requests, errors, cancellation."""

import asyncio
import copy
import gc
import math
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

import grpc
import pytest
from callers import CLIENTS, Threaded
from fake_engine import FakeEngine, last, more
from serving import served

from yuan_grpc.client import (
    AlreadyExistsError,
    AsyncClient,
    CancelledCallError,
    Client,
    DeadlineError,
    GenerateRequest,
    InternalError,
    InvalidRequestError,
    Limits,
    Loras,
    Message,
    NotFoundError,
    ResourceExhaustedError,
    Result,
    Token,
    UnavailableError,
    Violation,
    YuanError,
    sync,
)
from yuan_grpc.client.channel import LEAST_KEEPALIVE
from yuan_grpc.server.core.generation_service import GenerationService
from yuan_grpc.server.engine.types import (
    ChoiceDelta,
    EngineRequest,
    FinishReason,
    RankedToken,
    StepOutput,
    TokenLogprobs,
)
from yuan_grpc.server.errors import OverloadedError as Overload
from yuan_grpc.server.grpc.health import Health
from yuan_grpc.server.grpc.servicer import NAME, YuanService
from yuan_grpc.server.server import CHANNEL_OPTIONS, build
from yuan_grpc.v1 import yuan_pb2_grpc


@pytest.fixture(params=CLIENTS, ids=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> Any:
    """Either client."""
    return request.param


class Echoing(FakeEngine):
    """Answers with the prompt. A prompt that begins with `!` fails, `?` is overload, and one with `…` never ends.

    It counts what ran at most together; a prompt that begins with a digit ends when it is its turn.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self.turns = [asyncio.Event() for _ in range(3)]
        self.ended: list[str] = []

    async def generate(
        self, engine_request: EngineRequest, *, stream: bool, deadline: asyncio.Event | None = None
    ) -> AsyncGenerator[StepOutput, None]:
        text = "".join(map(chr, engine_request.prompt))
        self.running += 1
        self.most = max(self.most, self.running)
        self.began.set()
        try:
            if text[0] in "!?":
                raise KeyError(text) if text[0] == "!" else Overload("the queue is full")
            yield StepOutput()
            if text[0] == "…":
                await asyncio.Event().wait()
            if text[0].isdecimal():
                await self.turns[int(text[0])].wait()
            yield last(text)
            self.ended.append(text)
        finally:
            self.running -= 1
            self.freed.set()


async def test_generate_answers_with_values(kind: Any) -> None:
    engine = FakeEngine(last("yes"))
    async with served(engine) as address, kind(address) as client:
        answer = await client.generate("AB", request_id="mine", max_tokens=8, top_k=1)
    assert (answer.text, answer.request_id, answer.model, answer.seed) == ("yes", "mine", "fake", None)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 3)
    (choice,) = answer.choices
    assert (choice.index, choice.token_ids, choice.finish_reason) == (0, (121, 101, 115), "length")
    assert (choice.stop_string, choice.stop_token_id, choice.cumulative_logprob, choice.logprobs) == (
        *(None, None, None),
        (),
    )
    assert answer.message.choices[0].text == "yes"
    assert engine.requests[0].sampling.max_tokens == 8


@pytest.mark.parametrize(
    ("prompt", "seen"),
    [
        ("AB", "AB"),
        ([65, 66], "AB"),
        ([("user", "A"), ("assistant", "B"), ("user", "C")], "A|B|C>"),
        ([{"role": "user", "content": "A"}], "A>"),
        ([Message(role="user", content="A")], "A>"),
        (GenerateRequest(prompt="AB"), "AB"),
    ],
    ids=["text", "ids", "pairs", "dicts", "messages", "request"],
)
async def test_a_prompt_has_many_forms(kind: Any, prompt: Any, seen: str) -> None:
    async with served(Echoing()) as address, kind(address) as client:
        assert (await client.generate(prompt)).text == seen


async def test_a_bad_request_has_all_fields(kind: Any) -> None:
    async with served(FakeEngine(last())) as address, kind(address) as client:
        with pytest.raises(InvalidRequestError) as raised:
            await client.generate("AB", temperature=-1, top_p=7, request_id="mine")
    error = raised.value
    assert (error.code, error.reason, error.request_id) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_REQUEST",
        "mine",
    )
    assert [violation.field for violation in error.violations] == ["temperature", "top_p"]
    assert error.violations[0].description == "`temperature` must be between 0 and 2, not -1.0"
    assert str(error) == error.message == "; ".join(violation.description for violation in error.violations)
    assert error.retry_after is None
    assert isinstance(error.__cause__, grpc.RpcError)


async def test_overload_says_when_to_try_again(kind: Any) -> None:
    async with served(Echoing()) as address, kind(address, retries=0) as client:
        with pytest.raises(ResourceExhaustedError) as raised:
            await client.generate("?")
    assert (raised.value.reason, raised.value.retry_after, str(raised.value)) == (
        "OVERLOADED",
        1.0,
        "the queue is full",
    )


async def test_an_error_of_the_servers_own_is_internal(kind: Any) -> None:
    async with served(Echoing()) as address, kind(address) as client:
        with pytest.raises(InternalError) as raised:
            await client.generate("!")
    assert raised.value.reason == "INTERNAL"


async def test_an_unknown_model_is_not_found(kind: Any) -> None:
    async with served(FakeEngine(last())) as address, kind(address) as client:
        with pytest.raises(NotFoundError) as raised:
            await client.generate("AB", model="other")
    assert raised.value.reason == "MODEL_NOT_FOUND"


async def test_nobody_there_is_unavailable(kind: Any) -> None:
    async with kind("unix:///nobody/there", retries=0) as client:
        with pytest.raises(UnavailableError) as raised:
            await client.generate("AB")
    assert (raised.value.reason, raised.value.violations) == ("", ())


async def test_a_taken_name_is_told_and_not_tried_again(kind: Any) -> None:
    engine = FakeEngine(more("a"), hangs=True)
    async with served(engine) as address, kind(address) as client:
        async with client.stream("AB", request_id="taken") as stream:
            assert await anext(stream) == "a"
            with pytest.raises(AlreadyExistsError) as raised:
                await client.generate("AB", request_id="taken")
        assert (raised.value.reason, raised.value.request_id) == ("DUPLICATE_REQUEST_ID", "taken")
    assert len(engine.requests) == 1


async def test_an_aborted_call_is_cancelled(kind: Any) -> None:
    engine = FakeEngine(more("a"), hangs=True)
    async with served(engine) as address, kind(address) as client:
        stream = client.stream("AB")
        assert await anext(stream) == "a"
        await client.abort(stream.answer.request_id)
        with pytest.raises(CancelledCallError) as raised:
            await anext(stream)
    assert (raised.value.reason, raised.value.request_id) == ("ABORTED", stream.answer.request_id)
    assert engine.freed.is_set()


async def test_a_deadline_ends_a_call_and_frees_it(kind: Any) -> None:
    engine = FakeEngine(hangs=True)
    async with served(engine) as address, kind(address, timeout=0.1) as client:
        with pytest.raises(DeadlineError) as raised:
            await client.generate("AB")
        assert isinstance(raised.value, TimeoutError)
        await engine.freed.wait()


async def test_a_calls_own_timeout_counts(kind: Any) -> None:
    async with served(FakeEngine(hangs=True)) as address, kind(address) as client:
        with pytest.raises(DeadlineError):
            await client.generate("AB", timeout=0.1)


async def test_every_call_has_a_deadline_unless_told_otherwise(kind: Any) -> None:
    left: list[float | None] = []

    class Watching(grpc.aio.ServerInterceptor):
        async def intercept_service(self, continuation: Any, details: Any) -> Any:
            handler = await continuation(details)

            async def watched(request: Any, context: Any) -> Any:
                left.append(context.time_remaining())
                return await handler.unary_unary(request, context)

            return handler._replace(unary_unary=watched)

    server = grpc.aio.server(interceptors=[Watching()])
    yuan_pb2_grpc.add_YuanServiceServicer_to_server(YuanService(GenerationService(FakeEngine(last()))), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with kind(f"127.0.0.1:{port}") as client:
        for call in (client.generate("A"), client.model(), client.generate("A", timeout=math.inf)):
            await call
    await server.stop(None)
    assert [seconds and round(seconds, -1) for seconds in left] == [600, 30, None]


async def test_a_stream_yields_pieces_and_gathers_the_answer(kind: Any) -> None:
    ranked = RankedToken(97, "a", -0.5, 1)
    steps = [
        StepOutput([ChoiceDelta(0, "a", [97], [TokenLogprobs(ranked, (ranked,))], -0.5), ChoiceDelta(1, "x", [120])]),
        StepOutput([ChoiceDelta(1, "y", [121], finish_reason=FinishReason.STOP)]),
        StepOutput([ChoiceDelta(0, "b", [98], [TokenLogprobs(ranked, (ranked,))], -1.0, FinishReason.LENGTH)]),
    ]
    async with served(FakeEngine(*steps)) as address, kind(address) as client:
        async with client.stream("AB", n=2, logprobs=1, seed=5) as stream:
            assert await anext(stream) == "a"
            assert (stream.text, stream.answer.choices[0].finish_reason) == ("a", None)
            assert [delta async for delta in stream] == ["b"]
            streamed = stream.answer
        whole = await client.generate("AB", n=2, logprobs=1, seed=5, request_id=streamed.request_id)
    assert (stream.text, streamed.text) == ("ab", "ab")
    assert [choice.text for choice in streamed.choices] == ["ab", "xy"]
    assert [choice.finish_reason for choice in streamed.choices] == ["length", "stop"]
    assert len(streamed.choices[0].logprobs) == 2
    assert streamed.choices[0].cumulative_logprob == -1.0
    assert streamed == whole


async def test_flat_logprobs_of_a_stream_are_those_of_the_answer(kind: Any) -> None:
    ranked, other = RankedToken(97, "a", -0.5, 1), RankedToken(98, "b", -1.5, 2)
    steps = [StepOutput([ChoiceDelta(0, "a", [97], [TokenLogprobs(ranked, (ranked, other))])]) for _ in range(2)]
    steps.append(
        StepOutput([ChoiceDelta(0, "a", [97], [TokenLogprobs(ranked, (ranked, other))], -1.5, FinishReason.LENGTH)])
    )
    async with served(FakeEngine(*steps)) as address, kind(address) as client:
        async with client.stream("AB", logprobs=2, flat_logprobs=True) as stream:
            assert "".join([delta async for delta in stream]) == "aaa"
        whole = await client.generate("AB", logprobs=2, flat_logprobs=True)
    flat = stream.answer.message.choices[0].flat_logprobs
    assert len(flat.starts) == 3
    assert flat == whole.message.choices[0].flat_logprobs


async def test_leaving_the_block_frees_the_engine(kind: Any) -> None:
    engine = FakeEngine(more("a"), hangs=True)
    async with served(engine) as address, kind(address) as client:
        async with client.stream("AB") as stream:
            async for _ in stream:
                break
        await engine.freed.wait()
        assert [delta async for delta in stream] == []
    assert engine.running == 0


async def test_an_error_in_the_block_frees_the_engine(kind: Any) -> None:
    engine = FakeEngine(more("a"), hangs=True)
    async with served(engine) as address, kind(address) as client:
        with pytest.raises(ZeroDivisionError):
            await _break_down(client.stream("AB"))
        await engine.freed.wait()
    assert engine.running == 0


async def _break_down(stream: Any) -> None:
    async with stream:
        async for _ in stream:
            raise ZeroDivisionError


async def test_a_stream_that_nobody_holds_frees_the_engine(kind: Any) -> None:
    engine = FakeEngine(more("a"), hangs=True)
    async with served(engine) as address, kind(address) as client:
        stream = client.stream("AB")
        assert await anext(stream) == "a"
        del stream
        gc.collect()
        await engine.freed.wait()
    assert engine.running == 0


async def test_a_loop_left_frees_the_engine(kind: Any) -> None:
    engine = FakeEngine(more("a"), hangs=True)
    async with served(engine) as address, kind(address) as client:
        async for _ in client.stream("AB"):
            break
        gc.collect()
        await engine.freed.wait()
    assert engine.running == 0


async def test_closing_a_stream_ends_who_waits_for_it(kind: Any) -> None:
    engine = FakeEngine(more("a"), hangs=True)
    async with served(engine) as address, kind(address) as client:
        stream = client.stream("AB")
        assert await anext(stream) == "a"
        rest = asyncio.ensure_future(_all(stream))
        await asyncio.sleep(0)
        stream.close()
        assert await rest == []
        await engine.freed.wait()


def test_closing_a_client_does_not_wait_for_a_channel_that_never_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync, "CLOSE_SECONDS", 0.01)
    never = threading.Event()
    client = Client("127.0.0.1:1")
    monkeypatch.setattr(client._bare_channel, "close", never.wait)
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.model()
    never.set()


async def test_closing_a_client_ends_its_calls(kind: Any) -> None:
    engine = FakeEngine(hangs=True)
    async with served(engine) as address:
        client = kind(address)
        call = asyncio.ensure_future(client.generate("AB"))
        await engine.began.wait()
        await client.close()
        with pytest.raises(CancelledCallError):
            await call
        await engine.freed.wait()
        await client.close()
        with pytest.raises(RuntimeError, match="closed"):
            await client.generate("AB")
        with pytest.raises(RuntimeError, match="closed"):
            client.stream("AB")


async def test_a_cancelled_task_is_cancelled_and_frees_the_engine() -> None:
    engine = FakeEngine(hangs=True)
    async with served(engine) as address, AsyncClient(address) as client:
        task = asyncio.ensure_future(client.generate("AB"))
        await engine.began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await engine.freed.wait()


async def test_an_unknown_keyword_is_a_type_error_before_anything_is_sent(kind: Any) -> None:
    engine = FakeEngine(last())
    async with served(engine) as address, kind(address) as client:
        with pytest.raises(TypeError, match="`max_token` is no keyword"):
            await client.generate("AB", max_token=3)
        with pytest.raises(TypeError, match="`max_token` is no keyword"):
            client.stream("AB", max_token=3)
        with pytest.raises(TypeError, match="`max_token` is no keyword"):
            await _all(client.generate_many(["AB"], max_token=3))
    assert engine.requests == []


async def _all(items: Any) -> list[Any]:
    return [item async for item in items]


async def test_many_come_in_order(kind: Any) -> None:
    engine = Echoing()
    async with served(engine) as address, kind(address) as client:
        results = client.generate_many(["2", "1", "a", "0"], concurrency=4)
        first = asyncio.ensure_future(anext(results))
        for turn in engine.turns:
            assert not first.done()
            turn.set()
        found = [await first, *await _all(results)]
    assert [(result.index, result.prompt, result.text) for result in found] == [
        (i, text, text) for i, text in enumerate(["2", "1", "a", "0"])
    ]


async def test_many_come_as_completed(kind: Any) -> None:
    engine = Echoing()
    async with served(engine) as address, kind(address) as client:
        results, found = client.generate_many(["2", "1", "0"], concurrency=3, ordered=False), []
        for turn in engine.turns:
            turn.set()
            found.append(await anext(results))
        assert await _all(results) == []
    assert [(result.index, result.text) for result in found] == [(2, "0"), (1, "1"), (0, "2")]


@pytest.mark.parametrize("ordered", [True, False])
async def test_one_failure_loses_no_other(kind: Any, ordered: bool) -> None:
    prompts = ["a", "!", "b", "\ud800", "c", "x" * 100]
    async with served(Echoing()) as address, kind(address) as client:
        results = await _all(client.generate_many(prompts, concurrency=2, ordered=ordered))
    found = {result.index: result for result in results}
    assert sorted(found) == list(range(len(prompts)))
    assert [found[i].text for i in (0, 2, 4)] == ["a", "b", "c"]
    assert isinstance(found[1].error, InternalError)
    assert isinstance(found[3].error, InvalidRequestError)  # half a character, which no message can hold
    assert isinstance(found[5].error, InvalidRequestError)
    assert found[5].answer is None
    with pytest.raises(InvalidRequestError):
        _ = found[5].text


@pytest.mark.parametrize("ordered", [True, False])
async def test_many_are_bounded_and_the_source_may_be_endless(kind: Any, ordered: bool) -> None:
    engine, taken = Echoing(), []

    def endless() -> Iterator[str]:
        while True:
            taken.append("a")
            yield "a"

    async with served(engine) as address, kind(address) as client:
        results = client.generate_many(endless(), concurrency=3, ordered=ordered)
        async with aclosing(results):
            assert [(await anext(results)).text for _ in range(20)] == ["a"] * 20
    assert engine.most <= 3
    assert len(taken) <= 20 + 3 + 1


async def test_one_at_a_time_is_one_at_a_time(kind: Any) -> None:
    engine, taken = Echoing(), []

    def source() -> Iterator[str]:
        for text in ("0", "1"):
            taken.append(text)
            yield text

    async with served(engine) as address, kind(address) as client:
        results = client.generate_many(source(), concurrency=1)
        first = asyncio.ensure_future(anext(results))
        await engine.began.wait()
        assert taken == ["0"]
        for turn in engine.turns:
            turn.set()
        assert [(await first).text, *[result.text for result in await _all(results)]] == ["0", "1"]
    assert engine.most == 1


async def test_unread_results_are_bounded_by_the_first_that_is_slow(kind: Any) -> None:
    engine, taken = Echoing(), []

    def source() -> Iterator[str]:
        for text in ["…", *("abcdefghij")]:
            taken.append(text)
            yield text

    async with served(engine) as address, kind(address) as client:
        results = client.generate_many(source(), concurrency=3, timeout=1)
        assert isinstance((await anext(results)).error, DeadlineError)
        assert len(taken) <= 4
        assert len(await _all(results)) == 10


async def test_closing_many_frees_the_engine(kind: Any) -> None:
    engine = Echoing()
    async with served(engine) as address, kind(address) as client:
        results = client.generate_many(["a", "…", "…"], concurrency=3)
        assert (await anext(results)).text == "a"
        await results.aclose()
        while engine.running:  # noqa: ASYNC110 - each call that ends says so, and the last is meant
            await asyncio.sleep(0)
    assert engine.running == 0


async def test_a_loop_over_many_that_is_left_frees_the_engine() -> None:
    engine = Echoing()

    def leave(address: str) -> None:
        with Client(address) as client:
            for _ in client.generate_many(["a", "…", "…"], concurrency=3):
                break
            waited.wait()

    waited = threading.Event()
    async with served(engine) as address:
        leaving = asyncio.ensure_future(asyncio.to_thread(leave, address))
        await engine.freed.wait()
        while engine.running or not engine.ended:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0)
        waited.set()
        await leaving


async def test_an_interrupted_call_frees_the_engine() -> None:
    program = """
import signal, sys
from yuan_grpc.client import Client
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
with Client(sys.argv[1]) as client:
    try:
        client.generate("AB")
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        sys.stdin.read()
"""
    engine, pipe = FakeEngine(hangs=True), asyncio.subprocess.PIPE
    async with served(engine) as address:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, address, stdin=pipe, stdout=pipe)
        await engine.began.wait()
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert await process.stdout.readline() == b"interrupted\n"
        await engine.freed.wait()  # while the program goes on
        await process.communicate(b"")
    assert process.returncode == 0


async def test_a_broken_source_or_prompt_raises_and_frees_the_engine(kind: Any) -> None:
    engine = Echoing()
    async with served(engine) as address, kind(address) as client:
        with pytest.raises(TypeError, match="`prompt` must be text"):
            await _all(client.generate_many(["…", 7], concurrency=3))
        while engine.running:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0)


async def test_many_cannot_share_a_name(kind: Any) -> None:
    async with kind() as client:
        with pytest.raises(ValueError, match="`request_id` names one call"):
            await _all(client.generate_many(["a"], request_id="one"))
        with pytest.raises(ValueError, match="`concurrency` must be at least 1"):
            await _all(client.generate_many(["a"], concurrency=0))


async def test_no_prompts_are_no_results(kind: Any) -> None:
    async with kind() as client:
        assert await _all(client.generate_many([])) == []


async def test_an_async_source_may_wait_for_the_results_of_its_prompts() -> None:
    read: asyncio.Queue[Result] = asyncio.Queue()

    async def source() -> AsyncIterator[str]:
        yield "a"
        for _ in range(3):
            yield (await read.get()).text + "a"

    async with served(Echoing()) as address, AsyncClient(address) as client:
        texts = []
        async for result in client.generate_many(source(), concurrency=4):
            texts.append(result.text)
            read.put_nowait(result)
    assert texts == ["a", "aa", "aaa", "aaaa"]


async def test_text_becomes_tokens_and_back(kind: Any) -> None:
    async with served(FakeEngine()) as address, kind(address) as client:
        tokens = await client.tokenize("AB")
        assert tokens == [Token(65, "A", 0, 1), Token(66, "B", 1, 2)]
        assert await client.detokenize([token.id for token in tokens]) == "AB"
        assert [token.piece for token in await client.tokenize([("user", "A")])] == ["A", ">"]


async def test_the_model_is_told(kind: Any) -> None:
    async with served(FakeEngine()) as address, kind(address) as client:
        model = await client.model()
    assert (model.name, model.sizes.tokens, model.limits) == (
        "fake",
        0x110000,
        Limits(64, 20, 128, 1, None, False, False),
    )
    assert (model.lora.max_loras, model.lora.loaded) == (1, ())


async def test_adapters_come_and_go(kind: Any) -> None:
    async with served(FakeEngine()) as address, kind(address) as client:
        await client.load_lora("style")
        assert await client.loras() == Loras(("style",), ("style",))
        await client.unload_lora("style")
        with pytest.raises(NotFoundError):
            await client.unload_lora("style")


async def test_waiting_ends_when_the_server_serves(kind: Any) -> None:
    health = Health(NAME)
    async with served(FakeEngine(last()), health) as address, kind(address) as client:
        waiting = asyncio.ensure_future(client.wait_until_ready(timeout=30))
        with pytest.raises(DeadlineError, match=r"within 0.2 s: its health was NOT_SERVING"):
            await client.wait_until_ready(timeout=0.2)
        assert not waiting.done()
        await health.set_serving()
        await waiting


async def test_a_server_may_come_while_it_is_waited_for(kind: Any) -> None:
    health = Health(NAME)
    server, port = await build(YuanService(GenerationService(FakeEngine(last()))), health, "127.0.0.1:0")
    await server.start()
    async with kind(f"127.0.0.1:{port}") as client:
        await server.stop(None)
        with pytest.raises(DeadlineError, match="has not told its health"):
            await client.wait_until_ready(timeout=0.3)
        waiting = asyncio.ensure_future(client.wait_until_ready(timeout=30))
        health = Health(NAME)
        server, _ = await build(YuanService(GenerationService(FakeEngine(last()))), health, f"127.0.0.1:{port}")
        await server.start()
        await health.set_serving()
        await waiting
        assert (await client.generate("A")).text == "!"
        await server.stop(None)


def test_a_client_may_ping_no_more_often_than_our_server_takes() -> None:
    assert dict(CHANNEL_OPTIONS)["grpc.http2.min_ping_interval_without_data_ms"] <= LEAST_KEEPALIVE * 1000


async def test_large_answers_arrive(kind: Any) -> None:
    text = "x" * (5 << 20)
    engine = FakeEngine(StepOutput([ChoiceDelta(0, text, [1], finish_reason=FinishReason.LENGTH)]))
    async with served(engine) as address, kind(address) as client:
        assert (await client.generate("AB")).text == text


async def test_threads_share_a_client() -> None:
    async with served(Echoing()) as address, Threaded(address) as client:
        texts = [chr(0x4E00 + i) for i in range(50)]
        answers = await asyncio.gather(*(client.generate(text) for text in texts))
    assert [answer.text for answer in answers] == texts


async def test_an_async_client_may_be_made_before_its_loop() -> None:
    client = await asyncio.to_thread(AsyncClient, "127.0.0.1:1")
    async with client:
        assert "dns:///127.0.0.1:1" in repr(client)


def test_errors_can_be_copied_and_pickled() -> None:
    arguments = ("late", "OVERLOADED", (Violation("n", "no"),), 1.5, "mine")
    for error in (YuanError(grpc.StatusCode.UNKNOWN, *arguments), DeadlineError(grpc.StatusCode.UNKNOWN, *arguments)):
        for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
            assert (type(other), vars(other), str(other)) == (type(error), vars(error), "late")


def test_the_client_needs_grpcio_and_protobuf_alone() -> None:
    # typing_extensions comes with grpcio.
    program = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        allowed = {"grpc", "typing_extensions", "google", "yuan_grpc"} | sys.stdlib_module_names
        if top not in allowed or name.startswith(("yuan_grpc.server", "yuan_grpc.model", "google.rpc", "google.api")):
            raise ImportError(f"{name} must not be imported")
sys.meta_path.insert(0, Blocker())
import yuan_grpc.client
yuan_grpc.client.Client().close()
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=60)


async def test_both_clients_have_the_same_methods() -> None:
    assert {name for name in vars(Client) if name[0] != "_"} == {name for name in vars(AsyncClient) if name[0] != "_"}
