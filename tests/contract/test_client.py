"""The clients against the real service with a fake engine: calls, streams, many requests, errors, cancellation."""

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
from client_adapters import CLIENTS, SyncClientAdapter
from fake_engine import FakeEngine, last, more
from servers import serve_grpc

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
from yuan_grpc.client.channel import MIN_KEEPALIVE
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
from yuan_grpc.server.server import CHANNEL_OPTIONS, create_server
from yuan_grpc.v1 import yuan_pb2_grpc


@pytest.fixture(params=CLIENTS, ids=["sync", "async"])
def client_class(request: pytest.FixtureRequest) -> Any:
    """The sync or the async client."""
    return request.param


class EchoEngine(FakeEngine):
    """An engine that generates the prompt again and records the maximum number of concurrent requests.

    A prompt that begins with `!` fails, `?` reports overload, `…` never ends, and a digit waits for its turn.
    """

    def __init__(self) -> None:
        super().__init__()
        self.max_running = 0
        self.turns = [asyncio.Event() for _ in range(3)]
        self.finished: list[str] = []

    async def generate(
        self, engine_request: EngineRequest, *, stream: bool, deadline: asyncio.Event | None = None
    ) -> AsyncGenerator[StepOutput, None]:
        text = "".join(map(chr, engine_request.prompt))
        self.running += 1
        self.max_running = max(self.max_running, self.running)
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
            self.finished.append(text)
        finally:
            self.running -= 1
            self.freed.set()


async def test_generate_returns_a_completion(client_class: Any) -> None:
    engine = FakeEngine(last("yes"))
    async with serve_grpc(engine) as address, client_class(address) as client:
        completion = await client.generate("AB", request_id="mine", max_tokens=8, top_k=1)
    assert (completion.text, completion.request_id, completion.model, completion.seed) == ("yes", "mine", "fake", None)
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (2, 3)
    (choice,) = completion.choices
    assert (choice.index, choice.token_ids, choice.finish_reason) == (0, (121, 101, 115), "length")
    assert (choice.stop_string, choice.stop_token_id, choice.cumulative_logprob, choice.logprobs) == (
        *(None, None, None),
        (),
    )
    assert completion.message.choices[0].text == "yes"
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
async def test_a_prompt_may_have_any_of_its_forms(client_class: Any, prompt: Any, seen: str) -> None:
    async with serve_grpc(EchoEngine()) as address, client_class(address) as client:
        assert (await client.generate(prompt)).text == seen


async def test_an_invalid_request_error_has_all_fields(client_class: Any) -> None:
    async with serve_grpc(FakeEngine(last())) as address, client_class(address) as client:
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


async def test_an_overload_error_says_when_to_retry(client_class: Any) -> None:
    async with serve_grpc(EchoEngine()) as address, client_class(address, retries=0) as client:
        with pytest.raises(ResourceExhaustedError) as raised:
            await client.generate("?")
    assert (raised.value.reason, raised.value.retry_after, str(raised.value)) == (
        "OVERLOADED",
        1.0,
        "the queue is full",
    )


async def test_an_exception_in_the_engine_is_an_internal_error(client_class: Any) -> None:
    async with serve_grpc(EchoEngine()) as address, client_class(address) as client:
        with pytest.raises(InternalError) as raised:
            await client.generate("!")
    assert raised.value.reason == "INTERNAL"


async def test_an_unknown_model_is_not_found(client_class: Any) -> None:
    async with serve_grpc(FakeEngine(last())) as address, client_class(address) as client:
        with pytest.raises(NotFoundError) as raised:
            await client.generate("AB", model="other")
    assert raised.value.reason == "MODEL_NOT_FOUND"


async def test_an_unreachable_server_is_unavailable(client_class: Any) -> None:
    async with client_class("unix:///no/such/socket", retries=0) as client:
        with pytest.raises(UnavailableError) as raised:
            await client.generate("AB")
    assert (raised.value.reason, raised.value.violations) == ("", ())


async def test_a_duplicate_request_id_is_reported_and_not_retried(client_class: Any) -> None:
    engine = FakeEngine(more("a"), hangs=True)
    async with serve_grpc(engine) as address, client_class(address) as client:
        async with client.stream("AB", request_id="taken") as stream:
            assert await anext(stream) == "a"
            with pytest.raises(AlreadyExistsError) as raised:
                await client.generate("AB", request_id="taken")
        assert (raised.value.reason, raised.value.request_id) == ("DUPLICATE_REQUEST_ID", "taken")
    assert len(engine.requests) == 1


async def test_an_aborted_call_is_cancelled(client_class: Any) -> None:
    engine = FakeEngine(more("a"), hangs=True)
    async with serve_grpc(engine) as address, client_class(address) as client:
        stream = client.stream("AB")
        assert await anext(stream) == "a"
        await client.abort(stream.completion.request_id)
        with pytest.raises(CancelledCallError) as raised:
            await anext(stream)
    assert (raised.value.reason, raised.value.request_id) == ("ABORTED", stream.completion.request_id)
    assert engine.freed.is_set()


async def test_a_deadline_ends_a_call_and_frees_its_engine_request(client_class: Any) -> None:
    engine = FakeEngine(hangs=True)
    async with serve_grpc(engine) as address, client_class(address, timeout=0.1) as client:
        with pytest.raises(DeadlineError) as raised:
            await client.generate("AB")
        assert isinstance(raised.value, TimeoutError)
        await engine.freed.wait()


async def test_a_calls_timeout_overrides_the_clients(client_class: Any) -> None:
    async with serve_grpc(FakeEngine(hangs=True)) as address, client_class(address) as client:
        with pytest.raises(DeadlineError):
            await client.generate("AB", timeout=0.1)


async def test_every_call_has_a_deadline_by_default(client_class: Any) -> None:
    remaining: list[float | None] = []

    class DeadlineRecorder(grpc.aio.ServerInterceptor):
        async def intercept_service(self, continuation: Any, details: Any) -> Any:
            handler = await continuation(details)

            async def record(request: Any, context: Any) -> Any:
                remaining.append(context.time_remaining())
                return await handler.unary_unary(request, context)

            return handler._replace(unary_unary=record)

    server = grpc.aio.server(interceptors=[DeadlineRecorder()])
    yuan_pb2_grpc.add_YuanServiceServicer_to_server(YuanService(GenerationService(FakeEngine(last()))), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with client_class(f"127.0.0.1:{port}") as client:
        for call in (client.generate("A"), client.model(), client.generate("A", timeout=math.inf)):
            await call
    await server.stop(None)
    assert [seconds and round(seconds, -1) for seconds in remaining] == [600, 30, None]


async def test_a_stream_yields_deltas_and_builds_the_completion(client_class: Any) -> None:
    ranked = RankedToken(97, "a", -0.5, 1)
    steps = [
        StepOutput([ChoiceDelta(0, "a", [97], [TokenLogprobs(ranked, (ranked,))], -0.5), ChoiceDelta(1, "x", [120])]),
        StepOutput([ChoiceDelta(1, "y", [121], finish_reason=FinishReason.STOP)]),
        StepOutput([ChoiceDelta(0, "b", [98], [TokenLogprobs(ranked, (ranked,))], -1.0, FinishReason.LENGTH)]),
    ]
    async with serve_grpc(FakeEngine(*steps)) as address, client_class(address) as client:
        async with client.stream("AB", n=2, logprobs=1, seed=5) as stream:
            assert await anext(stream) == "a"
            assert (stream.text, stream.completion.choices[0].finish_reason) == ("a", None)
            assert [delta async for delta in stream] == ["b"]
            streamed = stream.completion
        unary = await client.generate("AB", n=2, logprobs=1, seed=5, request_id=streamed.request_id)
    assert (stream.text, streamed.text) == ("ab", "ab")
    assert [choice.text for choice in streamed.choices] == ["ab", "xy"]
    assert [choice.finish_reason for choice in streamed.choices] == ["length", "stop"]
    assert len(streamed.choices[0].logprobs) == 2
    assert streamed.choices[0].cumulative_logprob == -1.0
    assert streamed == unary


async def test_a_stream_has_the_same_flat_logprobs_as_the_unary_call(client_class: Any) -> None:
    ranked, other = RankedToken(97, "a", -0.5, 1), RankedToken(98, "b", -1.5, 2)
    steps = [StepOutput([ChoiceDelta(0, "a", [97], [TokenLogprobs(ranked, (ranked, other))])]) for _ in range(2)]
    steps.append(
        StepOutput([ChoiceDelta(0, "a", [97], [TokenLogprobs(ranked, (ranked, other))], -1.5, FinishReason.LENGTH)])
    )
    async with serve_grpc(FakeEngine(*steps)) as address, client_class(address) as client:
        async with client.stream("AB", logprobs=2, flat_logprobs=True) as stream:
            assert "".join([delta async for delta in stream]) == "aaa"
        unary = await client.generate("AB", logprobs=2, flat_logprobs=True)
    flat = stream.completion.message.choices[0].flat_logprobs
    assert len(flat.starts) == 3
    assert flat == unary.message.choices[0].flat_logprobs


async def test_leaving_the_with_block_frees_the_engine(client_class: Any) -> None:
    engine = FakeEngine(more("a"), hangs=True)
    async with serve_grpc(engine) as address, client_class(address) as client:
        async with client.stream("AB") as stream:
            async for _ in stream:
                break
        await engine.freed.wait()
        assert [delta async for delta in stream] == []
    assert engine.running == 0


async def test_an_exception_in_the_with_block_frees_the_engine(client_class: Any) -> None:
    engine = FakeEngine(more("a"), hangs=True)
    async with serve_grpc(engine) as address, client_class(address) as client:
        with pytest.raises(ZeroDivisionError):
            await _raise_while_reading(client.stream("AB"))
        await engine.freed.wait()
    assert engine.running == 0


async def _raise_while_reading(stream: Any) -> None:
    async with stream:
        async for _ in stream:
            raise ZeroDivisionError


async def test_a_garbage_collected_stream_frees_the_engine(client_class: Any) -> None:
    engine = FakeEngine(more("a"), hangs=True)
    async with serve_grpc(engine) as address, client_class(address) as client:
        stream = client.stream("AB")
        assert await anext(stream) == "a"
        del stream
        gc.collect()
        await engine.freed.wait()
    assert engine.running == 0


async def test_leaving_a_loop_over_a_stream_frees_the_engine(client_class: Any) -> None:
    engine = FakeEngine(more("a"), hangs=True)
    async with serve_grpc(engine) as address, client_class(address) as client:
        async for _ in client.stream("AB"):
            break
        gc.collect()
        await engine.freed.wait()
    assert engine.running == 0


async def test_closing_a_stream_ends_a_pending_read(client_class: Any) -> None:
    engine = FakeEngine(more("a"), hangs=True)
    async with serve_grpc(engine) as address, client_class(address) as client:
        stream = client.stream("AB")
        assert await anext(stream) == "a"
        remaining = asyncio.ensure_future(_collect(stream))
        await asyncio.sleep(0)
        stream.close()
        assert await remaining == []
        await engine.freed.wait()


def test_closing_a_client_does_not_wait_for_a_channel_that_never_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync, "CLOSE_TIMEOUT_SECONDS", 0.01)
    never = threading.Event()
    client = Client("127.0.0.1:1")
    assert client._connections.first
    monkeypatch.setattr(client._base_channels[0], "close", never.wait)
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.model()
    never.set()


async def test_closing_a_client_ends_its_calls(client_class: Any) -> None:
    engine = FakeEngine(hangs=True)
    async with serve_grpc(engine) as address:
        client = client_class(address)
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


async def test_cancelling_a_task_frees_the_engine() -> None:
    engine = FakeEngine(hangs=True)
    async with serve_grpc(engine) as address, AsyncClient(address) as client:
        task = asyncio.ensure_future(client.generate("AB"))
        await engine.began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await engine.freed.wait()


async def test_an_unknown_parameter_is_a_type_error_before_anything_is_sent(client_class: Any) -> None:
    engine = FakeEngine(last())
    async with serve_grpc(engine) as address, client_class(address) as client:
        with pytest.raises(TypeError, match="`max_token` is not a generation parameter"):
            await client.generate("AB", max_token=3)
        with pytest.raises(TypeError, match="`max_token` is not a generation parameter"):
            client.stream("AB", max_token=3)
        with pytest.raises(TypeError, match="`max_token` is not a generation parameter"):
            await _collect(client.generate_many(["AB"], max_token=3))
    assert engine.requests == []


async def _collect(items: Any) -> list[Any]:
    return [item async for item in items]


async def test_many_results_come_in_the_order_of_the_prompts(client_class: Any) -> None:
    engine = EchoEngine()
    async with serve_grpc(engine) as address, client_class(address) as client:
        results = client.generate_many(["2", "1", "a", "0"], concurrency=4)
        first = asyncio.ensure_future(anext(results))
        for turn in engine.turns:
            assert not first.done()
            turn.set()
        found = [await first, *await _collect(results)]
    assert [(result.index, result.prompt, result.text) for result in found] == [
        (i, text, text) for i, text in enumerate(["2", "1", "a", "0"])
    ]


async def test_many_results_come_as_they_finish(client_class: Any) -> None:
    engine = EchoEngine()
    async with serve_grpc(engine) as address, client_class(address) as client:
        results, found = client.generate_many(["2", "1", "0"], concurrency=3, ordered=False), []
        for turn in engine.turns:
            turn.set()
            found.append(await anext(results))
        assert await _collect(results) == []
    assert [(result.index, result.text) for result in found] == [(2, "0"), (1, "1"), (0, "2")]


@pytest.mark.parametrize("ordered", [True, False])
async def test_a_failed_request_does_not_affect_the_others(client_class: Any, ordered: bool) -> None:
    prompts = ["a", "!", "b", "\ud800", "c", "x" * 100]
    async with serve_grpc(EchoEngine()) as address, client_class(address) as client:
        results = await _collect(client.generate_many(prompts, concurrency=2, ordered=ordered))
    found = {result.index: result for result in results}
    assert sorted(found) == list(range(len(prompts)))
    assert [found[i].text for i in (0, 2, 4)] == ["a", "b", "c"]
    assert isinstance(found[1].error, InternalError)
    assert isinstance(found[3].error, InvalidRequestError)  # a lone surrogate, which cannot be encoded
    assert isinstance(found[5].error, InvalidRequestError)
    assert found[5].completion is None
    with pytest.raises(InvalidRequestError):
        _ = found[5].text


@pytest.mark.parametrize("ordered", [True, False])
async def test_many_requests_are_bounded_and_the_source_may_be_endless(client_class: Any, ordered: bool) -> None:
    engine, prompts_read = EchoEngine(), []

    def endless() -> Iterator[str]:
        while True:
            prompts_read.append("a")
            yield "a"

    async with serve_grpc(engine) as address, client_class(address) as client:
        results = client.generate_many(endless(), concurrency=3, ordered=ordered)
        async with aclosing(results):
            assert [(await anext(results)).text for _ in range(20)] == ["a"] * 20
    assert engine.max_running <= 3
    assert len(prompts_read) <= 20 + 3 + 1


async def test_a_concurrency_of_one_runs_one_request_at_a_time(client_class: Any) -> None:
    engine, prompts_read = EchoEngine(), []

    def source() -> Iterator[str]:
        for text in ("0", "1"):
            prompts_read.append(text)
            yield text

    async with serve_grpc(engine) as address, client_class(address) as client:
        results = client.generate_many(source(), concurrency=1)
        first = asyncio.ensure_future(anext(results))
        await engine.began.wait()
        assert prompts_read == ["0"]
        for turn in engine.turns:
            turn.set()
        assert [(await first).text, *[result.text for result in await _collect(results)]] == ["0", "1"]
    assert engine.max_running == 1


async def test_unread_results_after_a_slow_request_are_bounded(client_class: Any) -> None:
    engine, prompts_read = EchoEngine(), []

    def source() -> Iterator[str]:
        for text in ["…", *("abcdefghij")]:
            prompts_read.append(text)
            yield text

    async with serve_grpc(engine) as address, client_class(address) as client:
        results = client.generate_many(source(), concurrency=3, timeout=1)
        assert isinstance((await anext(results)).error, DeadlineError)
        assert len(prompts_read) <= 4
        assert len(await _collect(results)) == 10


async def test_closing_the_many_generator_frees_the_engine(client_class: Any) -> None:
    engine = EchoEngine()
    async with serve_grpc(engine) as address, client_class(address) as client:
        results = client.generate_many(["a", "…", "…"], concurrency=3)
        assert (await anext(results)).text == "a"
        await results.aclose()
        while engine.running:  # noqa: ASYNC110 - `freed` is set by the first call that ends
            await asyncio.sleep(0)
    assert engine.running == 0


async def test_leaving_a_loop_over_many_frees_the_engine() -> None:
    engine = EchoEngine()

    def leave(address: str) -> None:
        with Client(address) as client:
            for _ in client.generate_many(["a", "…", "…"], concurrency=3):
                break
            may_close.wait()

    may_close = threading.Event()
    async with serve_grpc(engine) as address:
        leaving = asyncio.ensure_future(asyncio.to_thread(leave, address))
        await engine.freed.wait()
        while engine.running or not engine.finished:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0)
        may_close.set()
        await leaving


@pytest.mark.timeout(60)
async def test_an_interrupted_call_frees_the_engine() -> None:
    program = """
import signal, sys
from yuan_grpc.client import Client
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
with Client(sys.argv[1]) as client:
    try:
        client.generate("AB")
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        sys.stdin.read()
"""
    engine, pipe = FakeEngine(hangs=True), asyncio.subprocess.PIPE
    async with serve_grpc(engine) as address:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, address, stdin=pipe, stdout=pipe)
        await engine.began.wait()
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert await process.stdout.readline() == b"interrupted\n"
        await engine.freed.wait()  # while the program continues
        await process.communicate(b"")
    assert process.returncode == 0


async def test_a_prompt_of_the_wrong_type_raises_and_frees_the_engine(client_class: Any) -> None:
    engine = EchoEngine()
    async with serve_grpc(engine) as address, client_class(address) as client:
        with pytest.raises(TypeError, match="`prompt` must be text"):
            await _collect(client.generate_many(["…", 7], concurrency=3))
        while engine.running:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0)


async def test_many_requests_cannot_share_a_request_id(client_class: Any) -> None:
    async with client_class() as client:
        with pytest.raises(ValueError, match="`request_id` must be unique per request"):
            await _collect(client.generate_many(["a"], request_id="one"))
        with pytest.raises(ValueError, match="`concurrency` must be at least 1"):
            await _collect(client.generate_many(["a"], concurrency=0))


async def test_no_prompts_give_no_results(client_class: Any) -> None:
    async with client_class() as client:
        assert await _collect(client.generate_many([])) == []


async def test_an_async_source_may_wait_for_results() -> None:
    received: asyncio.Queue[Result] = asyncio.Queue()

    async def source() -> AsyncIterator[str]:
        yield "a"
        for _ in range(3):
            yield (await received.get()).text + "a"

    async with serve_grpc(EchoEngine()) as address, AsyncClient(address) as client:
        texts = []
        async for result in client.generate_many(source(), concurrency=4):
            texts.append(result.text)
            received.put_nowait(result)
    assert texts == ["a", "aa", "aaa", "aaaa"]


async def test_text_is_tokenized_and_detokenized(client_class: Any) -> None:
    async with serve_grpc(FakeEngine()) as address, client_class(address) as client:
        tokens = await client.tokenize("AB")
        assert tokens == [Token(65, "A", 0, 1), Token(66, "B", 1, 2)]
        assert await client.detokenize([token.id for token in tokens]) == "AB"
        assert [token.piece for token in await client.tokenize([("user", "A")])] == ["A", ">"]


async def test_model_returns_the_served_model(client_class: Any) -> None:
    async with serve_grpc(FakeEngine()) as address, client_class(address) as client:
        model = await client.model()
    assert (model.name, model.sizes.tokens, model.limits) == (
        "fake",
        0x110000,
        Limits(64, 20, 128, 256, None, False, False),
    )
    assert (model.lora.max_loras, model.lora.loaded) == (1, ())


async def test_adapters_are_loaded_and_unloaded(client_class: Any) -> None:
    async with serve_grpc(FakeEngine()) as address, client_class(address) as client:
        await client.load_lora("style")
        assert await client.loras() == Loras(("style",), ("style",))
        await client.unload_lora("style")
        with pytest.raises(NotFoundError):
            await client.unload_lora("style")


async def test_waiting_ends_when_the_server_is_serving(client_class: Any) -> None:
    health = Health(NAME)
    async with serve_grpc(FakeEngine(last()), health) as address, client_class(address) as client:
        waiting = asyncio.ensure_future(client.wait_until_ready(timeout=30))
        with pytest.raises(DeadlineError, match=r"within 0.2 s: its health was NOT_SERVING"):
            await client.wait_until_ready(timeout=0.2)
        assert not waiting.done()
        await health.set_serving()
        await waiting


async def test_a_server_may_start_while_a_client_waits_for_it(client_class: Any) -> None:
    health = Health(NAME)
    server, port = await create_server(YuanService(GenerationService(FakeEngine(last()))), health, "127.0.0.1:0")
    await server.start()
    async with client_class(f"127.0.0.1:{port}") as client:
        await server.stop(None)
        with pytest.raises(DeadlineError, match="no health status was received"):
            await client.wait_until_ready(timeout=600, connect_timeout=0.3)
        waiting = asyncio.ensure_future(client.wait_until_ready(timeout=30))
        health = Health(NAME)
        server, _ = await create_server(YuanService(GenerationService(FakeEngine(last()))), health, f"127.0.0.1:{port}")
        await server.start()
        await health.set_serving()
        await waiting
        assert (await client.generate("A")).text == "!"
        await server.stop(None)


def test_the_server_accepts_the_clients_shortest_keepalive_interval() -> None:
    assert dict(CHANNEL_OPTIONS)["grpc.http2.min_ping_interval_without_data_ms"] <= MIN_KEEPALIVE * 1000


async def test_a_large_response_arrives(client_class: Any) -> None:
    text = "x" * (5 << 20)
    engine = FakeEngine(StepOutput([ChoiceDelta(0, text, [1], finish_reason=FinishReason.LENGTH)]))
    async with serve_grpc(engine) as address, client_class(address) as client:
        assert (await client.generate("AB")).text == text


async def test_threads_share_a_client() -> None:
    async with serve_grpc(EchoEngine()) as address, SyncClientAdapter(address) as client:
        texts = [chr(0x4E00 + i) for i in range(50)]
        completions = await asyncio.gather(*(client.generate(text) for text in texts))
    assert [completion.text for completion in completions] == texts


async def test_an_async_client_may_be_created_before_its_event_loop() -> None:
    client = await asyncio.to_thread(AsyncClient, "127.0.0.1:1")
    async with client:
        assert "dns:///127.0.0.1:1" in repr(client)


def test_errors_can_be_copied_and_pickled() -> None:
    arguments = ("late", "OVERLOADED", (Violation("n", "no"),), 1.5, "mine")
    for error in (YuanError(grpc.StatusCode.UNKNOWN, *arguments), DeadlineError(grpc.StatusCode.UNKNOWN, *arguments)):
        for clone in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
            assert (type(clone), vars(clone), str(clone)) == (type(error), vars(error), "late")


@pytest.mark.timeout(60)
def test_the_client_needs_only_grpcio_and_protobuf() -> None:
    # typing_extensions is a dependency of grpcio.
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
