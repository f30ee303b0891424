"""TLS, unix sockets, IPv6 and the limits of connections, at real ports."""

import asyncio
import logging
import os
import re
import shutil
import ssl
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from certificates import EXPIRED, Authority
from fake_engine import FakeEngine, last, more
from http2 import encode_stream_call, frame
from servers import serve_grpc, serve_http

from yuan_grpc.client import AsyncClient
from yuan_grpc.server.security.certificates import Certificates
from yuan_grpc.server.settings import HttpSettings
from yuan_grpc.server.settings.grpc_port import GrpcSettings
from yuan_grpc.v1 import yuan_pb2 as pb
from yuan_grpc.v1 import yuan_pb2_grpc

REQUEST = pb.GenerateRequest(prompt="AB")
RESPONSES = (last("yes"),)
Option = tuple[str, Any]


class Files:
    """The files of a server with TLS, and its authority."""

    def __init__(self, folder: Path, authority: Authority | None = None) -> None:
        self.folder = folder
        self.authority = authority or Authority()
        self.certificate, self.key = self.authority.write(folder)
        self.clients = folder / "clients.pem"
        self.clients.write_bytes(self.authority.pem)

    def certificates(self, *, mutual: bool = False) -> Certificates:
        return Certificates(self.certificate, self.key, self.clients if mutual else None)

    def client(self, *pair: bytes, root: bytes | None = None) -> grpc.ChannelCredentials:
        certificate, key = pair or (None, None)
        return grpc.ssl_channel_credentials(root or self.authority.pem, key, certificate)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@asynccontextmanager
async def connect(
    address: str, credentials: grpc.ChannelCredentials | None, options: Iterable[Option] = ()
) -> AsyncIterator[Any]:
    """Yield a stub on a connection of its own."""
    options = [("grpc.use_local_subchannel_pool", 1), *options]
    channel = (
        grpc.aio.secure_channel(address, credentials, options)
        if credentials
        else grpc.aio.insecure_channel(address, options)
    )
    async with channel:
        yield yuan_pb2_grpc.YuanServiceStub(channel)


async def generate(address: str, credentials: grpc.ChannelCredentials | None) -> str:
    """Return the text of a call on a new connection."""
    async with connect(address, credentials) as stub:
        return str((await stub.Generate(REQUEST)).choices[0].text)


async def failure(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await generate(address, credentials)
    return error.value.code()


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
async def test_calls_over_tls_succeed_on_ipv4_and_ipv6(files: Files, host: str) -> None:
    async with serve_grpc(FakeEngine(*RESPONSES), certificates=files.certificates(), host=host) as address:
        assert await generate(address, files.client()) == "yes"


async def test_a_client_with_another_authority_or_without_tls_gets_no_answer(files: Files) -> None:
    engine = FakeEngine(*RESPONSES)
    async with serve_grpc(engine, certificates=files.certificates()) as address:
        assert await failure(address, files.client(root=Authority().pem)) is grpc.StatusCode.UNAVAILABLE
        assert await failure(address, None) is grpc.StatusCode.UNAVAILABLE
    assert not engine.requests


async def test_mutual_tls_refuses_missing_expired_and_unknown_client_certificates(files: Files) -> None:
    engine = FakeEngine(*RESPONSES)
    refused = [
        files.client(),
        files.client(*files.authority.issue("client", valid=EXPIRED)),
        files.client(*Authority().issue("client")),
    ]
    async with serve_grpc(engine, certificates=files.certificates(mutual=True)) as address:
        for credentials in refused:
            assert await failure(address, credentials) is grpc.StatusCode.UNAVAILABLE
        assert not engine.requests
        assert await generate(address, files.client(*files.authority.issue("client"))) == "yes"


def replace_files(files: Files, authority: Authority) -> None:
    """Replace the certificate before its key, as tools do, so that they do not fit each other in between."""
    new = files.folder / "new"
    new.mkdir()
    certificate, key = authority.write(new)
    os.replace(certificate, files.certificate)
    os.replace(key, files.key)
    new.rmdir()


async def serial_number(address: str) -> str:
    """Return the serial number of the certificate that a new connection gets."""
    host, _, port = address.rpartition(":")
    pem = await asyncio.to_thread(ssl.get_server_certificate, (host, int(port)))
    return pem


@pytest.mark.timeout(60)
async def test_certificates_are_replaced_under_load_without_a_failed_call(files: Files) -> None:
    """Calls go on over open connections and over new ones, while the certificate changes several times."""
    async with serve_grpc(FakeEngine(*RESPONSES), certificates=files.certificates()) as address:
        calls, done = 0, asyncio.Event()

        async def call_until_done(*, reconnects: bool) -> None:
            nonlocal calls
            while not done.is_set():
                async with connect(address, files.client()) as stub:
                    for _ in range(1 if reconnects else 50):
                        await stub.Generate(REQUEST)
                        calls += 1

        loops = [asyncio.ensure_future(call_until_done(reconnects=index % 2 == 0)) for index in range(6)]
        seen = {await serial_number(address)}
        for _ in range(5):
            before = calls
            replace_files(files, files.authority)
            seen.add(await serial_number(address))
            while calls < before + 30:
                await asyncio.sleep(0)
                for loop in loops:
                    if loop.done():
                        loop.result()
        done.set()
        await asyncio.gather(*loops)
    assert len(seen) == 6


async def test_the_last_pair_that_fits_stays_in_use(files: Files) -> None:
    async with serve_grpc(FakeEngine(*RESPONSES), certificates=files.certificates()) as address:
        before = await serial_number(address)
        other = files.folder / "other"
        other.mkdir()
        certificate, key = files.authority.write(other)
        shutil.copy(certificate, files.certificate)  # its key follows later
        assert await serial_number(address) == before
        files.key.unlink()
        assert await serial_number(address) == before
        shutil.copy(key, files.key)
        assert await serial_number(address) == certificate.read_text()


async def test_a_replaced_client_authority_decides_about_new_connections(files: Files) -> None:
    old, new = files.authority, Authority("new")
    async with serve_grpc(FakeEngine(*RESPONSES), certificates=files.certificates(mutual=True)) as address:
        assert await generate(address, files.client(*old.issue("client"))) == "yes"
        files.clients.write_bytes(new.pem)
        assert await failure(address, files.client(*old.issue("client"))) is grpc.StatusCode.UNAVAILABLE
        assert await generate(address, files.client(*new.issue("client"))) == "yes"


async def test_the_unix_socket_answers_without_tls_and_only_its_owner(files: Files) -> None:
    path = files.folder / "socket"
    before = os.umask(0o077)
    try:
        async with serve_grpc(
            FakeEngine(*RESPONSES), settings=GrpcSettings(unix_socket=path), certificates=files.certificates()
        ) as address:
            assert await generate(f"unix:{path}", None) == "yes"
            assert await generate(address, files.client()) == "yes"
            assert path.stat().st_mode & 0o077 == 0
    finally:
        os.umask(before)


async def test_messages_above_the_limits_are_refused_in_both_directions() -> None:
    settings = GrpcSettings(max_request_bytes=2000, max_response_bytes=1000)
    async with (
        serve_grpc(FakeEngine(last("a" * 1500)), settings=settings) as address,
        connect(address, None) as stub,
    ):
        for prompt, reason in (("A" * 2100, "2000"), ("A", "1000")):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await stub.Generate(pb.GenerateRequest(prompt=prompt))
            assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert reason in str(error.value.details())


@pytest.mark.parametrize("asks", [True, False])
async def test_responses_are_compressed_for_clients_that_ask(asks: bool) -> None:
    engine = FakeEngine(last("a" * 100_000))
    async with serve_grpc(engine) as address:
        host, _, port = address.partition(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=2**20)
        fields = {b"grpc-accept-encoding": b"identity,gzip"} | ({b"response-encoding": b"gzip"} if asks else {})
        writer.write(encode_stream_call(fields) + frame(8, 0, 0, (2**24).to_bytes(4, "big")))
        writer.write(frame(8, 0, 1, (2**24).to_bytes(4, "big")))
        received = await reader.readuntil(b"grpc-status")
        writer.close()
        assert (len(received) < 10_000) is asks
        async with AsyncClient(address, gzip=asks) as client:
            assert (await client.generate("AB")).text == "a" * 100_000


async def test_a_connection_runs_no_more_calls_than_allowed() -> None:
    engine = FakeEngine(more("a"), hangs=True)
    async with (
        serve_grpc(engine, settings=GrpcSettings(max_concurrent_streams=2)) as address,
        connect(address, None) as stub,
        connect(address, None) as other,
    ):
        running = [stub.GenerateStream(REQUEST) for _ in range(2)]
        for stream in running:
            await stream.read()
        waiting = stub.GenerateStream(REQUEST)
        await other.GenerateStream(REQUEST).read()  # another connection has its own limit
        assert engine.running == 3
        running[0].cancel()
        await waiting.read()
        assert engine.running <= 3


@pytest.mark.timeout(60)
async def test_an_old_connection_is_replaced_and_its_calls_finish(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    engine = FakeEngine(more("a"), hangs=True)
    settings = GrpcSettings(max_connection_age=1)
    async with serve_grpc(engine, settings=settings) as address, connect(address, None) as stub:
        stream = stub.GenerateStream(pb.GenerateRequest(prompt="AB", partial_on_deadline=True), timeout=4)
        reasons: list[int] = []
        await stream.read()
        while len(connections(caplog)) < 2:
            await stub.GetModel(pb.GetModelRequest(), wait_for_ready=True)
            await asyncio.sleep(0.05)
        while (message := await stream.read()) is not grpc.aio.EOF:
            reasons += [choice.finish_reason for choice in message.choices]
    assert reasons[-1] == pb.FINISH_REASON_DEADLINE


def connections(caplog: pytest.LogCaptureFixture) -> set[str]:
    """Return the connections in the log of calls."""
    return set(re.findall(r"peer (\S+)", caplog.text))


async def ping_during_call(address: str, engine: FakeEngine, pings: int, seconds: float) -> bytes:
    """Ping during a silent call; return what the server sends until the last answer, or until it disconnects."""
    host, _, port = address.partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(encode_stream_call())
    await engine.began.wait()
    received = b""
    try:
        for number in range(pings):
            writer.write(frame(6, 0, 0, number.to_bytes(8, "big")))
            received += await reader.readuntil(frame(6, 1, 0, number.to_bytes(8, "big")))
            await asyncio.sleep(seconds)  # the interval of a client that pings
    except asyncio.IncompleteReadError as error:
        received += error.partial
    finally:
        writer.close()
    return received


@pytest.mark.timeout(60)
async def test_pings_each_second_do_not_end_a_silent_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prefill sends nothing. With grpcio's defaults, three pings in five minutes end the connection."""
    engine = FakeEngine(hangs=True)
    async with serve_grpc(engine) as address:
        assert b"too_many_pings" not in await ping_during_call(address, engine, 6, 1.0)
        assert not engine.freed.is_set()
    monkeypatch.setattr("yuan_grpc.server.server.CHANNEL_OPTIONS", [])
    async with serve_grpc(engine := FakeEngine(hangs=True)) as address:
        assert b"too_many_pings" in await ping_during_call(address, engine, 1000, 0.0)


async def http_status(port: int, context: ssl.SSLContext, path: str = "/health") -> int:
    async with httpx.AsyncClient(verify=context, trust_env=False) as client:
        return (await client.get(f"https://localhost:{port}{path}")).status_code


def http_context(files: Files) -> ssl.SSLContext:
    return ssl.create_default_context(cadata=files.authority.pem.decode())


async def test_http_has_the_same_certificates_and_reads_them_again(files: Files) -> None:
    async with serve_http(FakeEngine(*RESPONSES), certificates=files.certificates()) as listener:
        assert await http_status(listener.port, http_context(files)) == 200
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await http_status(listener.port, ssl.create_default_context(cadata=Authority().pem.decode()))
        before = await serial_number(f"127.0.0.1:{listener.port}")
        replace_files(files, files.authority)
        assert await http_status(listener.port, http_context(files)) == 200
        assert await serial_number(f"127.0.0.1:{listener.port}") != before


async def test_an_unfinished_handshake_over_http_is_closed(files: Files) -> None:
    settings = HttpSettings(header_timeout=0.2)
    async with serve_http(FakeEngine(), settings=settings, certificates=files.certificates()) as listener:
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        writer.close()
