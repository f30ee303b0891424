"""The client's connection: targets, TLS, tokens, retries, proxies, load balancing, traces."""

import json
import math
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import create_certificates, server_credentials
from client_adapters import CLIENTS
from fake_service import CODES, FakeService, running

from yuan_grpc.client import (
    AlreadyExistsError,
    AsyncClient,
    Client,
    ResourceExhaustedError,
    UnavailableError,
    YuanError,
)
from yuan_grpc.client.channel import MAX_ATTEMPTS, RETRYABLE_METHODS, Settings, service_config
from yuan_grpc.client.target import is_local
from yuan_grpc.client.tracing import trace_metadata
from yuan_grpc.v1 import yuan_pb2 as pb


def test_the_published_service_config_is_the_one_of_the_client() -> None:
    published = Path(__file__).parents[2] / "clients" / "service_config.json"
    assert json.loads(published.read_text()) == json.loads(service_config(MAX_ATTEMPTS - 1))


@pytest.fixture(params=CLIENTS, ids=["sync", "async"])
def client_class(request: pytest.FixtureRequest) -> Any:
    """The sync or the async client."""
    return request.param


@pytest.mark.parametrize(
    ("target", "uri"),
    [
        ("localhost:1", "dns:///localhost:1"),
        ("[::1]:1", "dns:///[::1]:1"),
        ("dns:///a:1", "dns:///a:1"),
        ("ipv4:127.0.0.1:1,127.0.0.1:2", "ipv4:127.0.0.1:1,127.0.0.1:2"),
        ("unix:/a/b", "unix:/a/b"),
    ],
)
def test_a_target_without_a_scheme_is_resolved_by_dns(target: str, uri: str) -> None:
    assert Settings(target).uri == uri


@pytest.mark.parametrize("target", ["", "host", "http://host:1", "host:", ":1", "a b:1", "::1"])
def test_an_invalid_target_is_rejected(target: str) -> None:
    with pytest.raises(ValueError, match="`target` must be host:port"):
        Client(target)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timeout": 0}, "`timeout` must be above 0"),
        ({"timeout": float("nan")}, "`timeout` must be above 0"),
        ({"retries": -1}, "`retries` must be at least 0, not -1"),
        ({"keepalive": 9.9}, "`keepalive` must be between 10 and 86400 seconds, or None to disable it, not 9.9"),
        ({"keepalive": math.inf}, "`keepalive` must be between 10 and 86400"),
        ({"client_cert": (b"", b"")}, "`client_cert` needs `tls`"),
        ({"max_response_bytes": 0}, "`max_response_bytes` must be between 1 and 2147483647, not 0"),
        ({"max_response_bytes": -1}, "`max_response_bytes` must be between 1 and 2147483647, not -1"),
        ({"max_response_bytes": 2**31}, "`max_response_bytes` must be between 1 and 2147483647, not 2147483648"),
    ],
)
def test_arguments_are_validated(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Client(**arguments)


@pytest.mark.parametrize("target", ["localhost:1", "127.0.0.9:1", "[::1]:1", "ipv6:[::1]:1", "unix:/a"])
def test_a_token_needs_no_tls_to_a_local_target(target: str) -> None:
    assert is_local(target)
    Client(target, token="secret").close()


@pytest.mark.parametrize(
    "target",
    [
        *("host:1", "10.0.0.1:1", "dns:///host:1", "ipv4:127.0.0.1:1,10.0.0.1:2", "localhost.evil:1", "xds:///a"),
        "dns://10.0.0.1/localhost:1",
    ],
)
def test_a_token_is_never_sent_to_a_remote_target_in_plaintext(target: str) -> None:
    with pytest.raises(ValueError, match="`token` needs `tls`"):
        Client(target, token="secret")
    Client(target, token="secret", tls=True).close()


def test_a_token_is_never_sent_through_a_proxy_in_plaintext() -> None:
    with pytest.raises(ValueError, match="never through a proxy"):
        Client("localhost:1", token="secret", proxy="http://proxy:1")
    assert ("grpc.enable_http_proxy", 0) in Settings("localhost:1", token="secret").channel_options()


@pytest.mark.parametrize("metadata", [{"Authorization": "Basic x"}, [("authorization", "Basic x")]])
def test_authorization_metadata_is_treated_as_a_token(metadata: Any) -> None:
    with pytest.raises(ValueError, match="`authorization` in `metadata` needs `tls`"):
        Client("host:1", metadata=metadata)
    Client("host:1", metadata=metadata, tls=True).close()
    assert ("grpc.enable_http_proxy", 0) in Settings("localhost:1", metadata=metadata).channel_options()
    assert ("grpc.enable_http_proxy", 0) in Settings("localhost:1").channel_options()  # a call may carry its own token
    with Client("host:1") as client, pytest.raises(ValueError, match="`authorization` in `metadata` needs `tls`"):
        client.generate("a", metadata=metadata)


def test_only_methods_without_side_effects_are_retried() -> None:
    (method,) = json.loads(service_config(4))["methodConfig"]
    assert [name["method"] for name in method["name"]] == list(RETRYABLE_METHODS)
    assert {name["service"] for name in method["name"]} == {"yuan.v1.YuanService"}
    assert json.loads(service_config(99))["methodConfig"][0]["retryPolicy"]["maxAttempts"] == MAX_ATTEMPTS
    assert "methodConfig" not in json.loads(service_config(0))
    methods = {method.name for method in pb.DESCRIPTOR.services_by_name["YuanService"].methods}
    assert methods - set(RETRYABLE_METHODS) == {"GenerateBatch", "Abort", "LoadLora", "UnloadLora"}


def test_the_callers_channel_options_override_the_defaults() -> None:
    options = dict(Settings("a:1", options=[("grpc.keepalive_time_ms", 7)]).channel_options())
    assert (options["grpc.keepalive_time_ms"], options["grpc.max_receive_message_length"]) == (7, 64 << 20)
    assert "grpc.keepalive_time_ms" not in dict(Settings("a:1", keepalive=None).channel_options())


@pytest.mark.parametrize("code", [CODES.UNAVAILABLE, CODES.RESOURCE_EXHAUSTED])
@pytest.mark.parametrize("pushback", ["1", None])
async def test_a_failed_generation_is_retried(client_class: Any, code: grpc.StatusCode, pushback: str | None) -> None:
    service = FakeService(failures=[code, code], pushback=pushback)
    with running(service) as address:
        async with client_class(address) as client:
            assert (await client.generate("a")).text == "ok"
            service.failures.append(code)
            async with client.stream("a") as stream:
                assert [delta async for delta in stream] == ["ok"]
    previous = [attempt.get("grpc-previous-rpc-attempts") for attempt in service.attempts]
    assert previous == [None, "1", "2", None, "1"]


async def test_retries_are_bounded(client_class: Any) -> None:
    service = FakeService(failures=[CODES.UNAVAILABLE] * 9, pushback="1")
    with running(service) as address:
        async with client_class(address, retries=2) as client:
            with pytest.raises(UnavailableError) as raised:
                await client.generate("a")
    assert (len(service.attempts), raised.value.retry_after) == (3, 0.001)


async def test_a_server_can_forbid_retries(client_class: Any) -> None:
    service = FakeService(failures=[CODES.RESOURCE_EXHAUSTED], pushback="-1")
    with running(service) as address:
        async with client_class(address) as client:
            with pytest.raises(ResourceExhaustedError):
                await client.generate("a")
    assert len(service.attempts) == 1


async def test_a_servers_retry_delay_is_kept_within_the_deadline(client_class: Any) -> None:
    service = FakeService(failures=[CODES.RESOURCE_EXHAUSTED], pushback="3600000")
    with running(service) as address:
        async with client_class(address) as client:
            with pytest.raises(YuanError):
                await client.generate("a", timeout=0.5)
    assert len(service.attempts) == 1


async def test_a_stream_that_has_begun_is_never_retried(client_class: Any) -> None:
    service = FakeService(failures=[CODES.UNAVAILABLE], pushback="1")
    with running(service) as address:
        async with client_class(address) as client, client.stream("late") as stream:
            assert await anext(stream) == "ok"
            with pytest.raises(UnavailableError) as raised:
                await anext(stream)
    assert (len(service.attempts), raised.value.request_id, stream.text) == (1, "from-server", "ok")


@pytest.mark.parametrize(("method", "argument"), [("load_lora", "a"), ("unload_lora", "a"), ("abort", "a")])
async def test_methods_with_side_effects_are_never_retried(client_class: Any, method: str, argument: str) -> None:
    service = FakeService(failures=[CODES.UNAVAILABLE], pushback="1")
    with running(service) as address:
        async with client_class(address) as client:
            with pytest.raises(UnavailableError):
                await getattr(client, method)(argument)
    assert len(service.attempts) == 1


async def test_other_errors_are_not_retried(client_class: Any) -> None:
    service = FakeService(failures=[CODES.ALREADY_EXISTS], pushback="1")
    with running(service) as address:
        async with client_class(address) as client:
            with pytest.raises(AlreadyExistsError):
                await client.generate("a", request_id="mine")
    assert len(service.attempts) == 1


async def test_a_long_prompt_is_retried_too(client_class: Any) -> None:
    service = FakeService(failures=[CODES.UNAVAILABLE], pushback="1")
    with running(service) as address:
        async with client_class(address) as client:
            assert (await client.generate("长" * 131_072)).text == "ok"
    assert len(service.attempts) == 2


async def test_calls_are_balanced_over_all_addresses(client_class: Any) -> None:
    with running(FakeService("one")) as one, running(FakeService("two")) as two:
        async with client_class(f"ipv4:{one},{two}") as client:
            texts: set[str] = set()
            while len(texts) < 2:  # the second may be connected later
                texts.add((await client.generate("a")).text)
            balanced = [(await client.generate("a")).text for _ in range(4)]
    assert balanced in (["one", "two"] * 2, ["two", "one"] * 2)


async def test_an_unreachable_server_is_skipped(client_class: Any) -> None:
    with running(FakeService("two")) as two:
        with running(FakeService("one")) as one:
            pass
        async with client_class(f"ipv4:{one},{two}") as client:
            assert {(await client.generate("a")).text for _ in range(8)} == {"two"}


async def test_a_unix_socket_is_a_target(client_class: Any, tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/socket"
    with running(FakeService(), address=address):
        async with client_class(address, token="secret") as client:
            assert (await client.generate("a")).text == "ok"


async def test_metadata_and_token_are_sent_with_each_call(client_class: Any) -> None:
    service, tokens = FakeService(), iter(["first", "second"])
    with running(service) as address:
        async with client_class(address, token=lambda: next(tokens), metadata={"X-Team": "a", "x-more": "b"}) as client:
            await client.generate("a")
            await client.generate("a", metadata=[("x-team", "c")])
    first, second = service.attempts
    assert (first["authorization"], second["authorization"]) == ("Bearer first", "Bearer second")
    assert (first["x-team"], second["x-team"], second["x-more"]) == ("a", "c", "b")
    assert first["user-agent"].startswith("yuan-grpc/")


class SyncInterceptor(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """An interceptor that records the called methods."""

    def __init__(self) -> None:
        self.methods: list[str] = []

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        self.methods.append(details.method)
        return continuation(details, request)

    def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        return self.intercept_unary_unary(continuation, details, request)


class AsyncUnary(grpc.aio.UnaryUnaryClientInterceptor):
    """The same for asyncio, which has one class per kind of call."""

    def __init__(self) -> None:
        self.methods: list[str] = []

    async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        self.methods.append(str(details.method, "ascii") if isinstance(details.method, bytes) else details.method)
        return await continuation(details, request)


class AsyncUnaryStream(grpc.aio.UnaryStreamClientInterceptor):
    """The same for asyncio streams."""

    def __init__(self, methods: list[str]) -> None:
        self.methods = methods

    async def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        self.methods.append(str(details.method, "ascii") if isinstance(details.method, bytes) else details.method)
        return await continuation(details, request)


async def test_interceptors_are_called(client_class: Any) -> None:
    interceptor = AsyncUnary() if client_class is AsyncClient else SyncInterceptor()
    interceptors: list[Any] = [interceptor]
    if client_class is AsyncClient:
        interceptors.append(AsyncUnaryStream(interceptor.methods))
    with running(FakeService()) as address:
        async with client_class(address, interceptors=interceptors) as client:
            await client.generate("a")
            async with client.stream("late") as stream:
                assert [delta async for delta in stream] == ["ok", "ok"]
            async with client.stream("late") as stream:
                assert await anext(stream) == "ok"
            assert [result.text async for result in client.generate_many(["a"])] == ["ok"]
    unary, streaming = "/yuan.v1.YuanService/Generate", "/yuan.v1.YuanService/GenerateStream"
    assert interceptor.methods == [unary, streaming, streaming, unary]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CA and the certificates it signed for a server and a client."""
    return create_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.mark.parametrize("as_bytes", [False, True], ids=["path", "bytes"])
async def test_tls_accepts_a_custom_ca_and_a_token(client_class: Any, certificates: Path, as_bytes: bool) -> None:
    service, path = FakeService(), certificates / "ca.pem"
    with running(service, server_credentials(certificates)) as address:
        async with client_class(address, tls=path.read_bytes() if as_bytes else path, token="secret") as client:
            assert (await client.generate("a")).text == "ok"
    assert service.attempts[0]["authorization"] == "Bearer secret"


async def test_a_certificate_of_an_unknown_ca_is_rejected(client_class: Any, certificates: Path) -> None:
    with running(FakeService(), server_credentials(certificates)) as address:
        async with client_class(address, tls=True, retries=0) as client:
            with pytest.raises(UnavailableError):
                await client.generate("a")


async def test_mtls_accepts_a_client_certificate(client_class: Any, certificates: Path) -> None:
    authority, client_cert = certificates / "ca.pem", (certificates / "client.pem", certificates / "client.key")
    with running(FakeService(), server_credentials(certificates, mutual=True)) as address:
        async with client_class(address, tls=authority, client_cert=client_cert) as client:
            assert (await client.generate("a")).text == "ok"
        async with client_class(address, tls=authority, retries=0) as client:
            with pytest.raises(UnavailableError):
                await client.generate("a")


def test_a_missing_certificate_file_is_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Client(tls=tmp_path / "none.pem")


@contextmanager
def proxy() -> Iterator[tuple[str, list[str]]]:
    """Yield the URL of a CONNECT proxy and the list of request lines it has received."""
    request_lines: list[str] = []

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        _shut(source)
        _shut(sink)

    def serve() -> None:
        while True:
            try:
                client_side, _ = listener.accept()
            except OSError:
                return
            sockets.append(client_side)
            head = b""
            while b"\r\n\r\n" not in head:
                head += client_side.recv(65536)
            request_lines.append(head.split(b"\r\n")[0].decode())
            host, _, port = request_lines[0].split(" ")[1].rpartition(":")
            server_side = socket.create_connection((host, int(port)))
            sockets.append(server_side)
            client_side.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            pumps.submit(pump, client_side, server_side)
            pumps.submit(pump, server_side, client_side)

    sockets: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(8) as pumps:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", request_lines
        finally:
            _shut(listener)
            thread.join()
            for connection in sockets:
                _shut(connection)
    for connection in sockets:
        connection.close()


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):  # already shut down
        connection.shutdown(socket.SHUT_RDWR)


async def test_a_proxy_is_used(client_class: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with running(FakeService()) as address, proxy() as (url, request_lines):
        async with client_class(address, proxy=url) as client:
            assert (await client.generate("a")).text == "ok"
    assert request_lines == [f"CONNECT {address} HTTP/1.1"]


async def test_the_current_trace_is_sent(client_class: Any) -> None:
    trace = pytest.importorskip("opentelemetry.trace")
    context = trace.SpanContext(
        0x11, 0x22, is_remote=False, trace_flags=trace.TraceFlags(1), trace_state=trace.TraceState([("a", "b")])
    )
    service, parent = FakeService(), f"00-{0x11:032x}-{0x22:016x}-01"
    with running(service) as address:
        async with client_class(address) as client:
            with trace.use_span(trace.NonRecordingSpan(context)):
                await client.generate("a")
                await client.generate("a", metadata=[("traceparent", "mine")])
            await client.generate("a")
    first, second, third = service.attempts
    assert (first["traceparent"], first["tracestate"]) == (parent, "a=b")
    assert second["traceparent"] == "mine"
    assert "traceparent" not in third


def test_without_opentelemetry_no_trace_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "opentelemetry", raising=False)
    assert trace_metadata() == ()
