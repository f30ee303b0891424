"""The errors of commands that reach no Yuan server. The servers of these tests are real."""

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import grpc
import pytest
from certificates import create_certificates, server_credentials
from fake_engine import FakeEngine
from servers import serve_http

from yuan_grpc.__main__ import main
from yuan_grpc.cli.common.diagnosis import find_cause

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CA and the certificates it signed for a server and a client."""
    return create_certificates(tmp_path_factory.mktemp("certificates"))


@contextmanager
def grpc_server(credentials: grpc.ServerCredentials | None = None) -> Iterator[int]:
    """Run a gRPC server without services; yield its port."""
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        address = "0.0.0.0:0"
        port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
        server.start()
        try:
            yield port
        finally:
            server.stop(None).wait()


@contextmanager
def tcp_server(respond: Callable[[socket.socket], None]) -> Iterator[int]:
    """Run a server that responds to each connection and closes it; yield its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            try:
                connection = listener.accept()[0]
            except OSError:
                return
            with connection:
                respond(connection)

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def error_of(capsys: Captured, *arguments: str) -> str:
    """Run `generate` with these arguments; return its only line on stderr."""
    assert main(["generate", "a", "--retries", "0", *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_an_unknown_name(capsys: Captured) -> None:
    assert error_of(capsys, "--address", "no-such-host.invalid:50051") == (
        "yuan-grpc: UNAVAILABLE: the name no-such-host.invalid is unknown: check --address or YUAN_GRPC_ADDRESS"
    )


def test_a_missing_socket(capsys: Captured, tmp_path: Path) -> None:
    line = error_of(capsys, "--address", f"unix:{tmp_path}/socket")
    assert line.startswith(f"yuan-grpc: UNAVAILABLE: nothing listens on unix:{tmp_path}/socket: start a server with ")


def test_a_server_with_tls_for_a_caller_without(capsys: Captured, certificates: Path) -> None:
    with grpc_server(server_credentials(certificates)) as port:
        line = error_of(capsys, "--address", f"localhost:{port}")
    assert line == (
        f"yuan-grpc: UNAVAILABLE: the server at localhost:{port} uses TLS: "
        "add --tls, or --tls CA with the file of its certificate authority"
    )


def test_a_server_without_tls_for_a_caller_with_it(capsys: Captured) -> None:
    with grpc_server() as port:
        line = error_of(capsys, "--address", f"localhost:{port}", "--tls")
    assert line == f"yuan-grpc: UNAVAILABLE: the server at localhost:{port} does not use TLS: remove --tls"


def test_certificates_that_cannot_be_verified(capsys: Captured, certificates: Path) -> None:
    authority = str(certificates / "ca.pem")
    with grpc_server(server_credentials(certificates)) as port:
        untrusted = error_of(capsys, "--address", f"localhost:{port}", "--tls")
        misnamed = error_of(capsys, "--address", f"127.0.0.2:{port}", "--tls", authority)
        assert find_cause(f"localhost:{port}", Path(authority)) is None
    assert "is not trusted (" in untrusted
    assert untrusted.endswith("): name its CA with --tls CA")
    assert "has another name (" in misnamed
    assert misnamed.endswith("): use its name in --address")
    assert not any("SSL" in line or "OPENSSL" in line for line in (untrusted, misnamed))


def test_a_server_that_requires_a_client_certificate(capsys: Captured, certificates: Path) -> None:
    authority, pair = certificates / "ca.pem", [certificates / "client.pem", certificates / "client.key"]
    with grpc_server(server_credentials(certificates, mutual=True)) as port:
        line = error_of(capsys, "--address", f"localhost:{port}", "--tls", str(authority))
        assert find_cause(f"localhost:{port}", authority, identity=pair) is None
    assert line.endswith("after the TLS handshake: it may require --identity CERT KEY")


def test_a_grpc_server_of_another_service(capsys: Captured) -> None:
    with grpc_server() as port:
        line = error_of(capsys, "--address", f"127.0.0.1:{port}")
        assert find_cause(f"127.0.0.1:{port}") is None
    assert line.startswith(f"yuan-grpc: UNIMPLEMENTED: the gRPC server at 127.0.0.1:{port} has no yuan.v1.YuanService")


def test_an_http_server(capsys: Captured) -> None:
    page = b"HTTP/1.1 505 HTTP Version Not Supported\r\nContent-Length: 0\r\n\r\n"
    with tcp_server(lambda connection: connection.sendall(page)) as port:
        line = error_of(capsys, "--address", f"127.0.0.1:{port}")
    assert "is an HTTP server, not a gRPC server: --address needs the gRPC port" in line


async def test_the_http_port_of_a_yuan_server() -> None:
    async with serve_http(FakeEngine()) as listener:
        cause = await asyncio.to_thread(find_cause, f"127.0.0.1:{listener.port}")
    assert cause is not None
    assert "is an HTTP server" in cause


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (b"SSH-2.0-x\r\n", "is not a gRPC server: its first bytes are b'SSH-2.0-x"),
        (b"", "accepts connections and closes them"),
    ],
)
def test_a_server_of_another_protocol(answer: bytes, cause: str, capsys: Captured) -> None:
    with tcp_server(lambda connection: connection.sendall(answer)) as port:
        assert cause in error_of(capsys, "--address", f"127.0.0.1:{port}")
        assert "is not a gRPC server with TLS" in error_of(capsys, "--address", f"127.0.0.1:{port}", "--tls")


def test_a_silent_server(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yuan_grpc.cli.common.diagnosis.SECONDS", 0.2)
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        line = error_of(capsys, "--address", f"127.0.0.1:{listener.getsockname()[1]}", "--timeout", "0.3")
    assert "accepts connections, but does not answer" in line


@pytest.mark.parametrize(
    "target", ["xds:///name", "dns://8.8.8.8/example.org:1", "vsock:1:2", "unix-abstract:name", "dns:///host"]
)
def test_targets_that_only_grpc_can_resolve_have_no_diagnosis(target: str) -> None:
    assert find_cause(target) is None


def test_nothing_is_sent_past_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_cause("no-such-host.invalid:1", proxy="http://proxy:1") is None
    monkeypatch.setenv("https_proxy", "http://proxy:1")
    assert find_cause("no-such-host.invalid:1") is None
    assert "nothing listens" in (find_cause("127.0.0.1:1") or "")


def test_every_prompt_of_a_file_fails_with_one_cause(capsys: Captured, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    arguments = ["--file", str(tmp_path / "prompts.txt"), "--address", "127.0.0.1:1", "--retries", "0"]
    assert main(["generate", *arguments]) == 1
    *prompts, summary, cause = capsys.readouterr().err.splitlines()
    assert prompts == [f"yuan-grpc: prompt {number}: UNAVAILABLE: no server answered" for number in (1, 2)]
    assert summary == "yuan-grpc: 2 of 2 prompts failed"
    assert cause.startswith("yuan-grpc: UNAVAILABLE: nothing listens on 127.0.0.1:1: ")


def test_a_request_for_several_choices_fails_with_one_line(capsys: Captured) -> None:
    assert error_of(capsys, "-n", "2", "--address", "127.0.0.1:1").startswith("yuan-grpc: UNAVAILABLE: nothing listens")
