"""Callers with tokens and certificates: scopes, ownership of request ids, and separate caches."""

import asyncio
import logging
import os
import ssl
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from certificates import Authority
from fake_engine import FakeEngine, last, more
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from health_client import health_stub
from servers import serve_grpc, serve_http

from yuan_grpc.client import AsyncClient, PermissionDeniedError, UnauthenticatedError
from yuan_grpc.server.engine.types import StepOutput
from yuan_grpc.server.grpc import orca
from yuan_grpc.server.security.authentication import Authenticator
from yuan_grpc.server.security.certificates import Certificates
from yuan_grpc.server.security.identity import Scope
from yuan_grpc.server.security.tokens import TokenFile, create_token, format_line
from yuan_grpc.server.settings.grpc_port import GrpcSettings
from yuan_grpc.server.settings.mesh import MeshSettings
from yuan_grpc.v1 import yuan_pb2 as pb
from yuan_grpc.v1 import yuan_pb2_grpc

CODES = grpc.StatusCode
ALICE, BOB, ROOT = (create_token() for _ in range(3))
SCOPES = {"alice": (Scope.GENERATE, ALICE), "bob": (Scope.GENERATE, BOB), "root": (Scope.ADMIN, ROOT)}


@pytest.fixture
def authenticator(tmp_path: Path) -> Authenticator:
    file = tmp_path / "tokens"
    file.write_text("\n".join(format_line(name, [scope], token) for name, (scope, token) in SCOPES.items()))
    return Authenticator(TokenFile(file))


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


@asynccontextmanager
async def serve(engine: FakeEngine, authenticator: Authenticator) -> AsyncIterator[Any]:
    """Yield a stub, without a token of its own."""
    async with (
        serve_grpc(engine, authenticator=authenticator) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        yield yuan_pb2_grpc.YuanServiceStub(channel)


async def code_of(call: Any) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return CODES.OK


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        bearer("wrong"),
        bearer(""),
        (("authorization", ALICE),),
        (("authorization", f"Basic {ALICE}"),),
        (*bearer(ALICE), *bearer(ROOT)),
    ],
    ids=["no token", "unknown token", "empty token", "no scheme", "another scheme", "two tokens"],
)
async def test_calls_without_a_valid_token_reach_no_engine(authenticator: Authenticator, metadata: Any) -> None:
    engine = FakeEngine(last("yes"))
    async with serve(engine, authenticator) as stub:
        request = pb.GenerateRequest(prompt="AB")
        assert await code_of(stub.Generate(request, metadata=metadata)) is CODES.UNAUTHENTICATED
        assert await code_of(stub.GenerateStream(request, metadata=metadata).read()) is CODES.UNAUTHENTICATED
        assert await code_of(stub.GetModel(pb.GetModelRequest(), metadata=metadata)) is CODES.UNAUTHENTICATED
        batch = stub.GenerateBatch(iter([pb.GenerateBatchRequest(request=request)]), metadata=metadata)
        assert await code_of(batch.read()) is CODES.UNAUTHENTICATED
    assert not engine.requests


async def test_a_status_names_the_reason(authenticator: Authenticator) -> None:
    async with serve_grpc(FakeEngine(last()), authenticator=authenticator) as address:
        async with AsyncClient(address) as client:
            with pytest.raises(UnauthenticatedError, match="must be `Bearer` and a token") as refused:
                await client.generate("AB")
            assert refused.value.reason == "UNAUTHENTICATED"
        async with AsyncClient(address, token=ALICE) as client:
            assert (await client.generate("AB")).text == "!"
            with pytest.raises(PermissionDeniedError, match="LoadLora needs the scope admin, which alice") as denied:
                await client.load_lora("style")
            assert denied.value.reason == "PERMISSION_DENIED"


@pytest.mark.parametrize(
    ("token", "expected"), [(ALICE, CODES.PERMISSION_DENIED), (ROOT, CODES.OK)], ids=["user", "admin"]
)
async def test_adapters_need_the_scope_admin(authenticator: Authenticator, token: str, expected: Any) -> None:
    engine = FakeEngine(last("yes"))
    async with serve(engine, authenticator) as stub:
        metadata = bearer(token)
        assert await code_of(stub.LoadLora(pb.LoadLoraRequest(name="style"), metadata=metadata)) is expected
        assert await code_of(stub.ListLoras(pb.ListLorasRequest(), metadata=metadata)) is expected
        assert engine.loras == (["style"] if expected is CODES.OK else [])
        assert await code_of(stub.UnloadLora(pb.UnloadLoraRequest(name="style"), metadata=metadata)) is expected
        assert await code_of(stub.Generate(pb.GenerateRequest(prompt="AB"), metadata=metadata)) is CODES.OK


async def test_health_is_open_and_reflection_needs_the_scope_admin(authenticator: Authenticator) -> None:
    async with (
        serve_grpc(FakeEngine(), authenticator=authenticator) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        assert (await health_stub(channel).Check(health_pb2.HealthCheckRequest())).status
        reflection: Any = reflection_pb2_grpc
        stub = reflection.ServerReflectionStub(channel)
        message: Any = reflection_pb2

        def reflect(metadata: Any) -> Any:
            return stub.ServerReflectionInfo(
                iter([message.ServerReflectionRequest(list_services="")]), metadata=metadata
            ).read()

        assert await code_of(reflect(())) is CODES.UNAUTHENTICATED
        assert await code_of(reflect(bearer(ALICE))) is CODES.PERMISSION_DENIED
        assert (await reflect(bearer(ROOT))).list_services_response.service


async def test_load_reports_need_a_token_in_trailers_and_as_a_stream(authenticator: Authenticator) -> None:
    mesh = MeshSettings(load_reports=True)
    async with (
        serve_grpc(FakeEngine(last("yes")), authenticator=authenticator, mesh=mesh) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        reports: Any = channel.unary_stream(
            f"/{orca.SERVICE}/{orca.METHOD}", response_deserializer=orca.OrcaLoadReport.FromString
        )
        assert await code_of(reports(b"").read()) is CODES.UNAUTHENTICATED
        assert await code_of(reports(b"", metadata=bearer("wrong")).read()) is CODES.UNAUTHENTICATED
        call = reports(b"", metadata=bearer(ALICE))
        assert (await call.read()).named_metrics["num_requests_running"] == 0
        call.cancel()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await yuan_pb2_grpc.YuanServiceStub(channel).Generate(pb.GenerateRequest(prompt="AB"))
        assert orca.TRAILER not in dict(refused.value.trailing_metadata() or ())


async def start(stub: Any, token: str, request_id: str = "") -> tuple[Any, str]:
    """Return a running stream, and its id."""
    stream = stub.GenerateStream(pb.GenerateRequest(prompt="AB", request_id=request_id), metadata=bearer(token))
    return stream, (await stream.read()).request_id


@pytest.mark.parametrize("request_id", ["mine", ""], ids=["chosen", "generated"])
async def test_a_strangers_call_cannot_be_aborted_or_noticed(authenticator: Authenticator, request_id: str) -> None:
    async with serve(FakeEngine(more("a"), hangs=True), authenticator) as stub:
        stream, running = await start(stub, ALICE, request_id)
        answers = []
        for name in (running, "unknown"):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await stub.Abort(pb.AbortRequest(request_id=name), metadata=bearer(BOB))
            answers.append((error.value.code(), str(error.value.details()).replace(name, "")))
        assert answers[0] == answers[1]
        assert answers[0][0] is CODES.NOT_FOUND
        other, _ = await start(stub, BOB, running)  # the same id is another call
        await stub.Abort(pb.AbortRequest(request_id=running), metadata=bearer(BOB))
        assert await code_of(read_to_end(other)) is CODES.CANCELLED
        assert not stream.done()
        stream.cancel()


async def read_to_end(stream: Any) -> None:
    while await stream.read() is not grpc.aio.EOF:
        pass


async def test_callers_abort_their_calls_on_any_connection(authenticator: Authenticator) -> None:
    async with (
        serve_grpc(FakeEngine(more("a"), hangs=True), authenticator=authenticator) as address,
        grpc.aio.insecure_channel(address) as channel,
        AsyncClient(address, token=ALICE, options=[("grpc.use_local_subchannel_pool", 1)]) as other,
    ):
        stream, _ = await start(yuan_pb2_grpc.YuanServiceStub(channel), ALICE, "mine")
        await other.abort("mine")
        assert await code_of(read_to_end(stream)) is CODES.CANCELLED


async def test_an_administrator_aborts_the_calls_of_others(authenticator: Authenticator) -> None:
    async with serve(FakeEngine(more("a"), hangs=True), authenticator) as stub:
        streams = [(await start(stub, token, "same"))[0] for token in (ALICE, BOB)]
        await stub.Abort(pb.AbortRequest(request_id="same"), metadata=bearer(ROOT))
        assert [await code_of(read_to_end(stream)) for stream in streams] == [CODES.CANCELLED] * 2


async def test_callers_share_no_cached_prefix_and_see_their_own(authenticator: Authenticator) -> None:
    engine = FakeEngine(StepOutput(cached_tokens=2), last("yes"))
    async with serve(engine, authenticator) as stub:
        for token, salt in ((ALICE, ""), (ALICE, ""), (BOB, ""), (ALICE, "a"), (BOB, "a")):
            request = pb.GenerateRequest(prompt="AB", cache_salt=salt)
            response = await stub.Generate(request, metadata=bearer(token))
            assert response.usage.cached_tokens == 2
    salts = [request.cache_salt for request in engine.requests]
    assert salts[0] == salts[1]
    assert len(set(salts)) == 4
    assert all(salts)


async def test_callers_may_share_the_cache_without_seeing_what_others_sent(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("\n".join(format_line(name, [scope], token) for name, (scope, token) in SCOPES.items()))
    engine = FakeEngine(StepOutput(cached_tokens=2), last("yes"))
    async with serve(engine, Authenticator(TokenFile(file), shares_cache=True)) as stub:
        for token, salt, expected in ((ALICE, "", 0), (BOB, "", 0), (BOB, "a", 2)):
            request = pb.GenerateRequest(prompt="AB", cache_salt=salt)
            assert (await stub.Generate(request, metadata=bearer(token))).usage.cached_tokens == expected
    assert [request.cache_salt for request in engine.requests] == ["", "", "a"]


async def test_the_log_names_the_caller(authenticator: Authenticator, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with serve(FakeEngine(last("yes")), authenticator) as stub:
        await stub.Generate(pb.GenerateRequest(prompt="AB"), metadata=bearer(ALICE))
        items = iter([pb.GenerateBatchRequest(request=pb.GenerateRequest(prompt="AB"))])
        await read_to_end(stub.GenerateBatch(items, metadata=bearer(BOB)))
    assert [line.count("caller alice") for line in caplog.messages] == [1, 0, 0]
    assert [line.count("caller bob") for line in caplog.messages] == [0, 1, 1]
    assert ALICE not in caplog.text


@pytest.mark.timeout(60)
async def test_tokens_are_replaced_under_load_without_a_failed_call(tmp_path: Path) -> None:
    """The caller switches to the new token while both are valid, then the old one is removed."""
    file, current = tmp_path / "tokens", [create_token()]

    def write(*tokens: str) -> None:
        (tmp_path / "new").write_text("\n".join(format_line("alice", [Scope.GENERATE], token) for token in tokens))
        os.replace(tmp_path / "new", file)

    write(*current)
    engine, calls, done = FakeEngine(last("yes")), 0, asyncio.Event()
    authenticator = Authenticator(TokenFile(file))
    async with serve_grpc(engine, authenticator=authenticator) as address:

        async def call_until_done(client: AsyncClient) -> None:
            nonlocal calls
            while not done.is_set():
                await client.generate("AB")
                calls += 1

        async with AsyncClient(address, token=lambda: current[-1], retries=0) as client:
            loops = [asyncio.ensure_future(call_until_done(client)) for _ in range(8)]
            for _ in range(5):
                old, new = current[-1], create_token()
                write(old, new)
                current.append(new)
                await wait_for(lambda before=calls: calls >= before + 40, loops)
                write(new)
                async with AsyncClient(address, token=old) as revoked:
                    with pytest.raises(UnauthenticatedError):
                        await revoked.generate("AB")
            done.set()
            await asyncio.gather(*loops)


async def wait_for(condition: Callable[..., bool], tasks: list["asyncio.Task[None]"]) -> None:
    """Return when the condition holds; raise what a task raised."""
    while not condition():
        await asyncio.sleep(0)
        for task in tasks:
            if task.done():
                task.result()


async def test_http_has_the_same_tokens_and_scopes(authenticator: Authenticator) -> None:
    engine = FakeEngine(last("yes"))
    async with (
        serve_http(engine, authenticator=authenticator) as listener,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{listener.port}", trust_env=False) as client,
    ):

        async def get(path: str, token: str = "") -> int:
            return (await client.get(path, headers=dict(bearer(token)) if token else {})).status_code

        assert [await get(path) for path in ("/health", "/ping/", "/health/")] == [200, 200, 200]
        assert [await get(path) for path in ("/v1/models", "/version", "/docs", "/metrics", "/none")] == [401] * 5
        assert [await get("/metrics", token) for token in (ALICE, ROOT)] == [403, 200]
        assert [await get("/metrics/", token) for token in ("", ALICE)] == [401, 403]
        assert [await get("/v1/models", token) for token in ("wrong", ALICE, ROOT)] == [401, 200, 200]
        body = {"prompt": "AB"}
        refused = await client.post("/v1/completions", json=body)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert refused.json()["error"]["type"] == "authentication_error"
        assert not engine.requests
        answer = await client.post("/v1/completions", json=body, headers=dict(bearer(ALICE)))
        assert answer.json()["choices"][0]["text"] == "yes"
        assert engine.requests[0].cache_salt


@pytest.fixture
def mutual(tmp_path: Path) -> tuple[Authority, Certificates]:
    authority = Authority()
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    return authority, Certificates(*authority.write(tmp_path), tmp_path / "ca.pem")


NAME = "spiffe://example/team/app"


async def test_a_certificate_is_an_identity(mutual: tuple[Authority, Certificates]) -> None:
    authority, certificates = mutual
    engine = FakeEngine(last("yes"))
    authenticator = Authenticator(allowed_names=[NAME], needs_certificate=True)
    async with serve_grpc(engine, certificates=certificates, authenticator=authenticator) as address:
        for names, allowed in ((["a.example", NAME], True), (["a.example"], False)):
            certificate, key = authority.issue("app", names)
            async with AsyncClient(address, tls=authority.pem, client_cert=(certificate, key)) as client:
                if allowed:
                    assert (await client.generate("AB")).text == "yes"
                else:
                    with pytest.raises(PermissionDeniedError, match=r"a\.example is not allowed here"):
                        await client.generate("AB")
    assert [bool(request.cache_salt) for request in engine.requests] == [True]


async def test_a_certificate_has_the_scopes_of_its_line(mutual: tuple[Authority, Certificates], tmp_path: Path) -> None:
    authority, certificates = mutual
    (tmp_path / "tokens").write_text(f"app generate cert:{NAME}\n{format_line('root', [Scope.ADMIN], ROOT)}")
    authenticator = Authenticator(TokenFile(tmp_path / "tokens"), needs_certificate=True)
    async with serve_grpc(FakeEngine(last("yes")), certificates=certificates, authenticator=authenticator) as address:
        for names, token, expected in (([NAME], None, "denied"), ([NAME], ROOT, "loaded"), (["b"], None, "unknown")):
            pair = authority.issue("app", names)
            async with AsyncClient(address, tls=authority.pem, client_cert=pair, token=token) as client:
                if expected == "unknown":
                    with pytest.raises(UnauthenticatedError):
                        await client.generate("AB")
                    continue
                assert (await client.generate("AB")).text == "yes"
                if expected == "denied":
                    with pytest.raises(PermissionDeniedError, match="which app does not have"):
                        await client.load_lora("style")
                else:
                    await client.load_lora("style")


async def test_http_refuses_missing_certificates_except_for_probes(
    mutual: tuple[Authority, Certificates], tmp_path: Path
) -> None:
    authority, certificates = mutual
    authenticator = Authenticator(needs_certificate=True)
    async with serve_http(FakeEngine(last("yes")), certificates=certificates, authenticator=authenticator) as listener:

        async def status(context: ssl.SSLContext, path: str) -> int:
            async with httpx.AsyncClient(verify=context, trust_env=False) as client:
                return (await client.get(f"https://localhost:{listener.port}{path}")).status_code

        context = ssl.create_default_context(cadata=authority.pem.decode())
        assert [await status(context, path) for path in ("/health", "/version")] == [200, 401]
        context.load_cert_chain(*authority.write(tmp_path, "client"))
        assert [await status(context, path) for path in ("/health", "/version", "/metrics")] == [200, 200, 200]
        unknown = ssl.create_default_context(cadata=authority.pem.decode())
        unknown.load_cert_chain(*Authority().write(tmp_path, "stranger"))
        with pytest.raises(httpx.TransportError):
            await status(unknown, "/health")


@pytest.mark.timeout(60)
async def test_the_command_line_has_the_counterparts(
    mutual: tuple[Authority, Certificates], tmp_path: Path, authenticator: Authenticator
) -> None:
    authority, certificates = mutual
    token = tmp_path / "alice.token"
    token.write_text(ALICE + "\n")
    client = [str(file) for file in authority.write(tmp_path, "client")]
    async with serve_grpc(FakeEngine(last("yes")), certificates=certificates, authenticator=authenticator) as address:
        command = [sys.executable, "-m", "yuan_grpc", "generate", "AB", "--address", address]
        command += ["--tls-ca-file", str(tmp_path / "ca.pem"), "--identity", *client]
        for arguments, environment, expected in (
            (["--token-file", str(token)], {}, "yes"),
            ([], {"YUAN_GRPC_TOKEN": ALICE}, "yes"),
            ([], {}, "UNAUTHENTICATED"),
        ):
            process = await asyncio.create_subprocess_exec(
                *command, *arguments, env=os.environ | environment, stdout=PIPE, stderr=PIPE
            )
            out, err = await process.communicate()
            assert expected in (out or err).decode()


async def test_the_unix_socket_needs_tokens_and_no_certificate(
    mutual: tuple[Authority, Certificates], tmp_path: Path, authenticator: Authenticator
) -> None:
    _, certificates = mutual
    settings = GrpcSettings(unix_socket=tmp_path / "socket")
    certificate_only = Authenticator(needs_certificate=True)
    for asked, token, expected in (
        (certificate_only, None, True),
        (authenticator, None, False),
        (authenticator, ALICE, True),
    ):
        async with (
            serve_grpc(FakeEngine(last("yes")), settings=settings, certificates=certificates, authenticator=asked),
            AsyncClient(f"unix:{settings.unix_socket}", token=token) as client,
        ):
            if expected:
                assert (await client.generate("AB")).text == "yes"
            else:
                with pytest.raises(UnauthenticatedError):
                    await client.generate("AB")
