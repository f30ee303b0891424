"""The clients against broken and hostile servers: every call ends with its result or a `YuanError`."""

import re
from collections.abc import Sequence
from typing import Any

import grpc
import pytest
from client_adapters import CLIENTS
from fake_engine import FakeEngine
from google.protobuf.message import Message
from hostile_server import END_HEADERS, END_STREAM, HEADERS, HostileServer, frame, header, serve, serve_frames
from servers import serve_grpc

from yuan_grpc.client import (
    GenerateRequest,
    InternalError,
    InvalidRequestError,
    ResourceExhaustedError,
    Result,
    UnavailableError,
    Violation,
    YuanError,
)
from yuan_grpc.client.channel import Settings
from yuan_grpc.client.errors import MAX_RETRY_AFTER_SECONDS, error_from_rpc
from yuan_grpc.client.google_rpc import BadRequest, ErrorInfo, RetryInfo
from yuan_grpc.server.errors import AnswerTooLargeError
from yuan_grpc.v1 import yuan_pb2 as pb

CODES = grpc.StatusCode
LENGTH = pb.FINISH_REASON_LENGTH
UNPARSABLE = b"\xff\xff\xff"


@pytest.fixture(params=CLIENTS, ids=["sync", "async"])
def client_class(request: pytest.FixtureRequest) -> Any:
    """The sync or the async client."""
    return request.param


def choice(index: int = 0, text: str = "a", finish_reason: Any = LENGTH) -> pb.Choice:
    return pb.Choice(index=index, text=text, finish_reason=finish_reason)


BROKEN_CHOICES = [
    ([], "has no choices"),
    ([choice(5)], "has choices with the wrong indexes: [5]"),
    ([choice(0), choice(0)], "has choices with the wrong indexes: [0, 0]"),
    ([choice(1), choice(0)], "has choices with the wrong indexes: [1, 0]"),
    ([choice(0), choice(2**32 - 1)], "has choices with the wrong indexes: [0, 4294967295]"),
    ([choice(index) for index in range(129)], "has 129 choices, more than 128"),
    ([choice(0), choice(1, finish_reason=0)], "ends before choice 1 is finished"),
]


@pytest.mark.parametrize(("choices", "problem"), BROKEN_CHOICES, ids=[problem for _, problem in BROKEN_CHOICES])
async def test_a_response_without_its_choices_is_an_error(
    client_class: Any, choices: Sequence[pb.Choice], problem: str
) -> None:
    response = pb.GenerateResponse(request_id="from-server", choices=choices)
    with serve(HostileServer({"Generate": [response]})) as address:
        async with client_class(address) as client:
            with pytest.raises(InternalError) as raised:
                await client.generate("a")
            results = [result async for result in client.generate_many(["a", GenerateRequest(request_id="mine")])]
    assert str(raised.value) == f"the server's response {problem}"
    assert raised.value.request_id == "from-server"
    assert [result_error(result).request_id for result in results] == ["from-server", "mine"]
    with pytest.raises(InternalError, match="the server's response"):
        _ = results[0].text


def result_error(result: Result, kind: type[YuanError] = InternalError) -> YuanError:
    assert isinstance(result.error, kind)
    return result.error


@pytest.mark.parametrize(
    ("choices", "problem"),
    [
        ([], "has no choices"),
        ([choice(1)], "has choices with the wrong indexes: [1]"),
        ([choice(128)], "has a choice with the wrong index: 128"),
        ([choice(0), choice(2**32 - 1)], "has a choice with the wrong index: 4294967295"),
        ([choice(0, finish_reason=0)], "ends before choice 0 is finished"),
        ([choice(0), choice(1, finish_reason=0)], "ends before choice 1 is finished"),
    ],
)
async def test_a_stream_without_its_choices_is_an_error(
    client_class: Any, choices: Sequence[pb.Choice], problem: str
) -> None:
    messages = [pb.GenerateStreamResponse(request_id="from-server", choices=[one]) for one in choices]
    messages.insert(0, pb.GenerateStreamResponse(request_id="from-server"))
    with serve(HostileServer({"GenerateStream": messages})) as address:
        async with client_class(address) as client, client.stream("a") as stream:
            with pytest.raises(InternalError) as raised:
                async for _ in stream:
                    pass
    assert str(raised.value) == f"the server's response {problem}"
    assert raised.value.request_id == "from-server"


@pytest.mark.timeout(60)
async def test_heartbeats_without_end_do_not_grow_a_stream(client_class: Any) -> None:
    messages = [pb.GenerateStreamResponse()] * 5_000
    last = pb.GenerateStreamResponse(choices=[choice(text="end")])
    with serve(HostileServer({"GenerateStream": [*messages, last]})) as address:
        async with client_class(address) as client, client.stream("a") as stream:
            assert [delta async for delta in stream] == ["end"]
    assert stream.completion.message.ByteSize() < 64


async def test_an_unknown_finish_reason_and_absent_usage_are_accepted(client_class: Any) -> None:
    answers: dict[str, list[Message | bytes]] = {
        "Generate": [pb.GenerateResponse(choices=[choice(finish_reason=77)])],
        "GenerateStream": [pb.GenerateStreamResponse(choices=[choice(finish_reason=77)])],
    }
    with serve(HostileServer(answers)) as address:
        async with client_class(address) as client:
            completion = await client.generate("a")
            async with client.stream("a") as stream:
                assert [delta async for delta in stream] == ["a"]
    for received in (completion, stream.completion):
        assert (received.choices[0].finish_reason, received.usage.completion_tokens) == ("unknown (77)", 0)


CALLS: list[Any] = [
    lambda client: client.generate("a", request_id="mine"),
    lambda client: client.tokenize("a"),
    lambda client: client.detokenize([1]),
    lambda client: client.model(),
    lambda client: client.loras(),
    lambda client: client.load_lora("a"),
    lambda client: client.unload_lora("a"),
    lambda client: client.abort("mine"),
    lambda client: read(client.stream("a", request_id="mine")),
]


async def read(stream: Any) -> None:
    async with stream:
        async for _ in stream:
            pass


@pytest.mark.parametrize("messages", [[], [UNPARSABLE]], ids=["missing", "malformed"])
@pytest.mark.parametrize("call", CALLS, ids=map(str, range(len(CALLS))))
async def test_a_missing_or_malformed_response_is_an_error(client_class: Any, call: Any, messages: Any) -> None:
    methods = {method.name for method in pb.DESCRIPTOR.services_by_name["YuanService"].methods}
    with serve(HostileServer({method: messages for method in methods})) as address:
        async with client_class(address) as client:
            with pytest.raises(InternalError):
                await call(client)


async def test_each_malformed_response_of_many_is_an_error(client_class: Any) -> None:
    with serve(HostileServer({"Generate": [UNPARSABLE]})) as address:
        async with client_class(address) as client:
            results = [result async for result in client.generate_many(["a", "b"])]
    assert [type(result.error) for result in results] == [InternalError, InternalError]


def details(*messages: Any) -> bytes:
    status = pb.Status(code=13, message="no")
    for message in messages:
        status.details.add().Pack(message)
    return status.SerializeToString()


def delay(seconds: int, nanos: int = 0) -> Any:
    retry = RetryInfo()
    retry.retry_delay.seconds, retry.retry_delay.nanos = seconds, nanos
    return retry


class FakeRpcError(grpc.RpcError):
    """A gRPC error with any trailers, also those that grpcio would not send."""

    def __init__(self, *trailers: tuple[str, str | bytes]) -> None:
        self._trailers = trailers

    def code(self) -> grpc.StatusCode:
        return CODES.RESOURCE_EXHAUSTED

    def details(self) -> str:
        return "no"

    def trailing_metadata(self) -> Any:
        return self._trailers


@pytest.mark.parametrize(
    ("trailer", "retry_after"),
    [
        (details(delay(3, 500_000_000)), 3.5),
        (details(delay(0)), 0),
        (details(delay(10**11)), MAX_RETRY_AFTER_SECONDS),
        (details(delay(2**63 - 1)), MAX_RETRY_AFTER_SECONDS),
        (details(delay(-5)), None),
        (details(delay(0, -(2**31))), None),
        (details(delay(-(2**63))), None),
        ("1500", 1.5),
        ("9999999999", MAX_RETRY_AFTER_SECONDS),
        ("9" * 5_000, None),
        ("-1", None),
        ("1e3", None),
        ("٣", None),
        ("", None),
        (b"\xff", None),
    ],
    ids=repr,
)
def test_a_retry_delay_is_between_zero_and_an_hour(trailer: str | bytes, retry_after: float | None) -> None:
    is_pushback = isinstance(trailer, str) or trailer == b"\xff"
    error = error_from_rpc(
        FakeRpcError(("grpc-retry-pushback-ms" if is_pushback else "grpc-status-details-bin", trailer))
    )
    assert error.retry_after == retry_after


@pytest.mark.parametrize("raw", [UNPARSABLE, b"", b"\x00", details(delay(1))[:-1]], ids=repr)
def test_malformed_details_do_not_hide_the_status(raw: bytes) -> None:
    trailers = (("grpc-status-details-bin", raw), ("x-other", b"\xff\xfe"), ("x-other-bin", b"\xff"))
    error = error_from_rpc(FakeRpcError(*trailers), "mine")
    assert (type(error), error.reason, error.request_id) == (ResourceExhaustedError, "", "mine")


def test_malformed_details_do_not_hide_the_others() -> None:
    info, bad_request = ErrorInfo(reason="OVERLOADED"), BadRequest()
    bad_request.field_violations.add(field="n", description="no")
    status = pb.Status.FromString(details(info, bad_request))
    for position in (0, 1, 3):
        status.details.insert(position, status.details[0].__class__(type_url="t/google.rpc.RetryInfo", value=b"\xff"))
    error = error_from_rpc(FakeRpcError(("grpc-status-details-bin", status.SerializeToString())))
    assert (error.reason, error.violations, error.retry_after) == ("OVERLOADED", (Violation("n", "no"),), None)


@pytest.mark.parametrize("pushback", ["-1", "soon", "99999999999999999999"])
async def test_a_pushback_that_is_no_delay_forbids_retries(client_class: Any, pushback: str) -> None:
    server = HostileServer(code=CODES.UNAVAILABLE, trailers=[("grpc-retry-pushback-ms", pushback)])
    with serve(server) as address:
        async with client_class(address) as client:
            with pytest.raises(UnavailableError):
                await client.generate("a")
    assert server.attempts == ["Generate"]


async def generate(client: Any, prompt: str) -> None:
    await client.generate(prompt, request_id="mine")


async def stream(client: Any, prompt: str) -> None:
    await read(client.stream(prompt, request_id="mine"))


@pytest.mark.parametrize("call", [generate, stream])
async def test_a_request_that_is_too_large_for_the_server_is_sent_once(client_class: Any, call: Any) -> None:
    server = HostileServer()
    with serve(server) as address:
        async with client_class(address) as client:
            with pytest.raises(ResourceExhaustedError, match="SERVER: Received message larger than max") as raised:
                await call(client, "x" * (5 << 20))
    assert len(server.attempts) == 1
    assert (raised.value.request_id, raised.value.retry_after) == ("mine", None)


@pytest.mark.parametrize("call", [generate, stream])
async def test_a_request_that_is_too_large_for_the_client_is_not_retried(client_class: Any, call: Any) -> None:
    sizes: dict[str, Any] = {"options": [("grpc.max_send_message_length", 1 << 20)], "timeout": 60}
    assert Settings(**sizes, target="a:1").channel_options().count(("grpc.per_rpc_retry_buffer_size", 1 << 20)) == 1
    server = HostileServer()
    with serve(server) as address:
        async with client_class(address, **sizes) as client:
            with pytest.raises(ResourceExhaustedError, match="CLIENT: Sent message larger than max"):
                await call(client, "x" * (2 << 20))
    assert server.attempts == []


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
@pytest.mark.parametrize("call", [generate, stream])
async def test_a_response_that_is_too_large_is_an_error_and_not_retried(
    client_class: Any, call: Any, compression: grpc.Compression
) -> None:
    choices = [choice(text="x" * (2 << 20))]
    answers: dict[str, list[Message | bytes]] = {
        "Generate": [pb.GenerateResponse(choices=choices)],
        "GenerateStream": [pb.GenerateStreamResponse(choices=choices)],
    }
    server = HostileServer(answers, compression=compression)
    with serve(server) as address:
        async with client_class(address, max_response_bytes=1 << 20) as client:
            with pytest.raises(ResourceExhaustedError, match="larger than max") as raised:
                await call(client, "a")
        async with client_class(address, max_response_bytes=4 << 20) as client:
            await call(client, "a")
    assert len(server.attempts) == 2
    assert raised.value.request_id == "mine"


async def test_responses_are_bounded_by_default(client_class: Any) -> None:
    response = pb.GenerateResponse(choices=[choice(text="x" * (65 << 20))])
    with serve(HostileServer({"Generate": [response]})) as address:
        async with client_class(address) as client:
            with pytest.raises(ResourceExhaustedError, match="larger than max"):
                await client.generate("a")


@pytest.mark.parametrize("call", [generate, stream])
async def test_the_error_of_a_lost_connection_has_the_request_id(client_class: Any, call: Any) -> None:
    async with client_class("unix:///no/such/socket", retries=0) as client:
        with pytest.raises(UnavailableError) as raised:
            await call(client, "a")
    assert raised.value.request_id == "mine"


async def test_the_error_of_a_request_that_cannot_be_encoded_has_the_request_id(client_class: Any) -> None:
    async with client_class() as client:
        for prompt, parameters in (
            ("\ud800", {"request_id": "mine"}),
            ("a", {"seed": 2**99, "request_id": "mine"}),
            (GenerateRequest(request_id="mine"), {"seed": 2**99}),
        ):
            with pytest.raises(InvalidRequestError) as raised:
                await client.generate(prompt, **parameters)
            assert (raised.value.request_id, len(raised.value.violations)) == ("mine", 1)
            assert isinstance(raised.value.__cause__, ValueError)
        (result,) = [result async for result in client.generate_many([GenerateRequest(request_id="mine")], seed=2**99)]
        assert result_error(result, InvalidRequestError).request_id == "mine"


async def test_an_error_has_the_request_id_that_the_server_generated(client_class: Any) -> None:
    async with serve_grpc(FakeEngine(RuntimeError("broken"))) as address, client_class(address) as client:
        with pytest.raises(InternalError) as unary:
            await client.generate("A")
        with pytest.raises(InternalError) as streamed:
            await read(client.stream("A"))
        with pytest.raises(InternalError) as named:
            await client.generate("A", request_id="mine")
        with pytest.raises(InvalidRequestError) as huge:
            await client.generate("A", request_id="x" * 100_000)
        with pytest.raises(InvalidRequestError) as wide:
            await client.generate("A", request_id="编号", n=0)
    assert re.fullmatch("[0-9a-f]{32}", unary.value.request_id)
    assert re.fullmatch("[0-9a-f]{32}", streamed.value.request_id)
    assert (named.value.request_id, wide.value.request_id) == ("mine", "编号")
    assert len(huge.value.request_id) == 100_000


def test_a_request_id_of_the_server_may_have_any_bytes() -> None:
    assert error_from_rpc(FakeRpcError(("x-request-id", b"a\xff\x1b"))).request_id == "a\ufffd\x1b"


async def test_the_server_forbids_retries_that_cannot_succeed(client_class: Any) -> None:
    engine = FakeEngine(AnswerTooLargeError("the answer must be small"))
    async with serve_grpc(engine) as address, client_class(address) as client:
        for call in (generate, stream):
            with pytest.raises(ResourceExhaustedError) as raised:
                await call(client, "A")
            assert (raised.value.reason, raised.value.retry_after) == ("ANSWER_TOO_LARGE", None)
    assert len(engine.requests) == 2


RAW_TRAILERS = [
    {b"x-other": b"\xff\xfe"},
    {b"x-request-id": b"\xff\xfe"},
    {b"grpc-message": b"%E2%80%AE%1B%FF%"},
    {b"grpc-retry-pushback-ms": b"9" * 5_000},
    {b"grpc-retry-pushback-ms": b"\xff"},
    {b"grpc-status-details-bin": b"not base64!"},
    {b"grpc-status-details-bin": b"\xff\xff"},
    {b"x-\xff": b"a"},
    {b"x-many-%d" % number: b"a" * 1_000 for number in range(64)},
]


@pytest.mark.parametrize("trailers", RAW_TRAILERS, ids=lambda trailers: repr(trailers)[:40])
@pytest.mark.parametrize("status", [b"13", b"0", b"99", b"-1", b"x", None], ids=str)
@pytest.mark.parametrize("call", [generate, stream])
async def test_trailers_of_any_bytes_end_in_a_yuan_error(
    client_class: Any, call: Any, status: bytes | None, trailers: dict[bytes, bytes]
) -> None:
    values = trailers if status is None else {b"grpc-status": status} | trailers

    def answer(stream_id: int) -> bytes:
        head = header(b":status", b"200") + header(b"content-type", b"application/grpc")
        tail = b"".join(header(name, value) for name, value in values.items())
        return frame(HEADERS, END_HEADERS, stream_id, head) + frame(HEADERS, END_HEADERS | END_STREAM, stream_id, tail)

    with serve_frames(answer) as address:
        async with client_class(address, retries=0, timeout=30) as client:
            with pytest.raises(YuanError) as raised:
                await call(client, "a")
    assert raised.value.request_id == "mine"
