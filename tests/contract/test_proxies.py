"""Envoy, nginx and HAProxy with the configurations of `deploy/`, in front of real servers with fake engines."""

import asyncio
import base64
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from certificates import create_certificates
from fake_engine import FakeEngine, last, more
from fake_server import Options, fake_server
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.duration_pb2 import Duration
from ports import free_port
from proxies import Proxy, run_proxy
from servers import serve_grpc

from yuan_grpc.client import AsyncClient, AsyncStream, YuanError
from yuan_grpc.server.engine.load import EngineLoad
from yuan_grpc.server.engine.types import EngineRequest, StepOutput
from yuan_grpc.server.errors import OverloadedError
from yuan_grpc.server.grpc.health import Health
from yuan_grpc.server.grpc.servicer import NAME
from yuan_grpc.server.settings.mesh import MeshSettings
from yuan_grpc.v1 import yuan_pb2 as pb
from yuan_grpc.v1 import yuan_pb2_grpc

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]
PROXIES = ("envoy", "nginx", "haproxy")
REQUEST = pb.GenerateRequest(prompt="AB")

IDLE_LIMITS = {
    "envoy": "stream_idle_timeout: 300s=>stream_idle_timeout: 1s",
    "nginx": "grpc_read_timeout 1h=>grpc_read_timeout 1s",
    "haproxy": "timeout server 1h=>timeout server 1s",
}
"""The setting of each proxy that ends a silent stream, reduced to a second."""


@pytest.fixture(params=PROXIES)
def name(request: pytest.FixtureRequest) -> str:
    """The name of a proxy."""
    return str(request.param)


@asynccontextmanager
async def proxied(
    name: str, engine: FakeEngine, folder: Path, certificates: Path | None = None, edits: Sequence[str] = ()
) -> AsyncIterator[Proxy]:
    """Serve an engine, with a proxy in front of it that has found the server healthy."""
    health = Health(NAME)
    async with serve_grpc(engine, health) as server:
        await health.set_serving()
        starting = run_proxy(name, [server], folder, certificates, edits)
        proxy = await asyncio.to_thread(starting.__enter__)
        try:
            await wait_until_served(proxy)
            yield proxy
        finally:
            await asyncio.to_thread(starting.__exit__, None, None, None)


async def wait_until_served(proxy: Proxy) -> None:
    """Return when a call reaches a server, which is after the first health check."""
    async with grpc.aio.insecure_channel(proxy.address) as channel:
        while True:
            try:
                await stub_of(channel).GetModel(pb.GetModelRequest())
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.05)
            else:
                return


def stub_of(channel: grpc.aio.Channel) -> Any:
    return yuan_pb2_grpc.YuanServiceStub(channel)


@asynccontextmanager
async def connect(name: str, engine: FakeEngine, folder: Path, edits: Sequence[str] = ()) -> AsyncIterator[Any]:
    """Serve an engine through a proxy; yield a stub."""
    async with proxied(name, engine, folder, edits=edits) as proxy, grpc.aio.insecure_channel(proxy.address) as channel:
        yield stub_of(channel)


async def test_calls_of_every_kind_pass(name: str, tmp_path: Path) -> None:
    async with connect(name, FakeEngine(more("a"), last("b")), tmp_path) as stub:
        response = await stub.Generate(REQUEST)
        deltas = [choice.text async for message in stub.GenerateStream(REQUEST) for choice in message.choices]
        items = [pb.GenerateBatchRequest(request=REQUEST) for _ in range(20)]
        results = [result async for result in stub.GenerateBatch(iter(items))]
    assert response.choices[0].text == "ab"
    assert deltas == ["a", "b"]
    assert [result.response.choices[0].text for result in results] == ["ab"] * 20


async def test_a_batch_may_send_more_than_a_message_in_total(name: str, tmp_path: Path) -> None:
    request = pb.GenerateRequest(prompt="AB", cache_salt="x" * 1000)
    items = [pb.GenerateBatchRequest(request=request) for _ in range(1200)]
    async with connect(name, FakeEngine(last("b")), tmp_path) as stub:
        results = [result async for result in stub.GenerateBatch(iter(items))]
    assert len(results) == len(items)
    assert {result.response.choices[0].text for result in results} == {"b"}


async def test_errors_keep_their_status_details_and_request_id(name: str, tmp_path: Path) -> None:
    async with connect(name, FakeEngine(last()), tmp_path) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.Generate(pb.GenerateRequest(prompt="AB", temperature=-1, request_id="mine"))
    trailers = dict(raised.value.trailing_metadata() or ())
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert trailers["x-request-id"] == "mine"
    assert "grpc-status-details-bin" in trailers


async def test_tokens_are_delivered_while_the_stream_runs_and_a_cancelled_call_frees_its_engine_request(
    name: str, tmp_path: Path
) -> None:
    engine = FakeEngine(more("a"), hangs=True)
    async with connect(name, engine, tmp_path) as stub:
        call = stub.GenerateStream(REQUEST)
        while not (await call.read()).choices:
            pass
        assert engine.running == 1
        call.cancel()
        await engine.freed.wait()


async def test_a_deadline_ends_a_call_on_the_server(name: str, tmp_path: Path) -> None:
    engine = FakeEngine(more("a"), hangs=True)
    async with connect(name, engine, tmp_path) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.Generate(REQUEST, timeout=0.5)
        await engine.freed.wait()
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_partial_output_arrives_before_the_deadline(name: str, tmp_path: Path) -> None:
    engine = FakeEngine(more("a"), hangs=True)
    async with connect(name, engine, tmp_path) as stub:
        response = await stub.Generate(pb.GenerateRequest(prompt="AB", partial_on_deadline=True), timeout=2)
    assert response.choices[0].text == "a"
    assert response.choices[0].finish_reason == pb.FINISH_REASON_DEADLINE


async def test_a_silent_stream_is_cut_at_the_idle_limit_of_the_proxy(name: str, tmp_path: Path) -> None:
    engine = FakeEngine(more("a"), hangs=True)
    async with connect(name, engine, tmp_path, [IDLE_LIMITS[name]]) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            async for _ in stub.GenerateStream(REQUEST):
                pass
        await engine.freed.wait()
    assert raised.value.code() is not grpc.StatusCode.CANCELLED


async def test_heartbeats_keep_a_silent_stream_below_the_idle_limit(name: str, tmp_path: Path) -> None:
    request = pb.GenerateRequest(prompt="AB", heartbeat_interval=Duration(nanos=200_000_000))
    async with connect(name, FakeEngine(more("a"), hangs=True), tmp_path, [IDLE_LIMITS[name]]) as stub:
        call = stub.GenerateStream(request)
        messages = [await call.read() for _ in range(15)]  # three seconds of silence
        call.cancel()
    assert all(isinstance(message, pb.GenerateStreamResponse) for message in messages)


async def test_the_route_timeout_of_envoy_cuts_every_stream(tmp_path: Path) -> None:
    """Its default of 15 s must be off: heartbeats do not extend it."""
    request = pb.GenerateRequest(prompt="AB", heartbeat_interval=Duration(nanos=200_000_000))
    edits = [" timeout: 0s=> timeout: 1s", "max_stream_duration: {grpc_timeout_header_max: 0s}=>"]
    async with connect("envoy", FakeEngine(more("a"), hangs=True), tmp_path, edits) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            async for _ in stub.GenerateStream(request):
                pass
    assert raised.value.code() is grpc.StatusCode.INTERNAL


class OverloadedOnce(FakeEngine):
    """An engine whose queue is full for the first request."""

    def script_for(self, request: EngineRequest) -> tuple[Sequence[StepOutput | Exception], bool]:
        return [last("yes") if self.requests else OverloadedError("the request queue is full (limit 1)")], False


async def test_clients_retry_after_the_delay_of_the_server(name: str, tmp_path: Path) -> None:
    engine = OverloadedOnce()
    async with proxied(name, engine, tmp_path) as proxy:
        async with grpc.aio.insecure_channel(proxy.address, options=[("grpc.enable_retries", 0)]) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stub_of(channel).Generate(REQUEST)
        assert 1000 <= int(dict(raised.value.trailing_metadata() or ())["grpc-retry-pushback-ms"]) <= 2000
        assert len(engine.requests) == 1  # the proxy did not retry
        engine.requests.clear()
        async with AsyncClient(proxy.address) as client:
            assert (await client.generate("AB")).text == "yes"
        assert len(engine.requests) == 2


LOAD_POLICY = """
      load_balancing_policy:
        policies:
          - typed_extension_config:
              name: weighted
              typed_config:
                "@type": type.googleapis.com/envoy.extensions.load_balancing_policies.client_side_weighted_round_robin.v3.ClientSideWeightedRoundRobin
                blackout_period: 0s
                weight_update_period: 0.1s
"""  # noqa: E501 - the name of a type


async def test_envoy_sends_more_calls_to_the_server_with_less_load(tmp_path: Path) -> None:
    engines = FakeEngine(last()), FakeEngine(last())
    for engine, running in zip(engines, (1, 9), strict=True):
        engine.loads = [EngineLoad(num_running=running, max_num_seqs=10)]
    async with AsyncExitStack() as stack:
        servers = []
        for engine in engines:
            health = Health(NAME)
            servers.append(
                await stack.enter_async_context(serve_grpc(engine, health, mesh=MeshSettings(load_reports=True)))
            )
            await health.set_serving()
        edits = [f"\n      lb_policy: LEAST_REQUEST\n=>{LOAD_POLICY}"]
        starting = run_proxy("envoy", servers, tmp_path, edits=edits)
        proxy = await asyncio.to_thread(stack.enter_context, starting)  # it waits for the health of the servers
        await wait_until_served(proxy)
        stub = stub_of(await stack.enter_async_context(grpc.aio.insecure_channel(proxy.address)))
        idle = busy = 0
        while idle < 3 * busy or idle + busy < 40:  # the timeout is the limit
            before = [len(engine.requests) for engine in engines]
            await asyncio.gather(*(stub.Generate(REQUEST) for _ in range(40)))
            idle, busy = (len(engine.requests) - count for engine, count in zip(engines, before, strict=True))
            await asyncio.sleep(0.1)
    assert idle + busy == 40


async def test_a_proxy_without_servers_is_unavailable(name: str, tmp_path: Path) -> None:
    with run_proxy(name, [f"127.0.0.1:{free_port()}"], tmp_path) as proxy:
        async with grpc.aio.insecure_channel(proxy.address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stub_of(channel).Generate(REQUEST)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_tls_ends_at_the_proxy(name: str, tmp_path: Path) -> None:
    certificates = create_certificates(tmp_path)
    async with proxied(name, FakeEngine(more("a"), last("b")), tmp_path, certificates) as proxy:
        async with AsyncClient(proxy.tls_address, tls=certificates / "ca.pem", token="secret") as client:
            assert (await client.generate("AB")).text == "ab"
            async with client.stream("AB") as stream:
                assert [delta async for delta in stream] == ["a", "b"]
        async with AsyncClient(proxy.tls_address, tls=True, retries=0, timeout=5) as client:
            with pytest.raises(YuanError):
                await client.generate("AB")


@contextmanager
def two_servers(options: Options) -> Iterator[tuple[list[str], list["subprocess.Popen[bytes]"]]]:
    """Run two server processes; yield their addresses and the processes."""
    ports = [free_port(), free_port()]
    with ExitStack() as stack:
        processes = [
            stack.enter_context(fake_server(port, options, stderr=subprocess.PIPE, start_new_session=True))
            for port in ports
        ]
        yield [f"127.0.0.1:{port}" for port in ports], processes


@pytest.mark.timeout(120)
async def test_no_call_fails_when_one_of_two_servers_is_drained(name: str, tmp_path: Path) -> None:
    with two_servers(Options(tokens=30, token_seconds=0.02)) as (servers, processes):
        with run_proxy(name, servers, tmp_path) as proxy:
            await wait_until_served(proxy)
            async with AsyncClient(proxy.address, timeout=60) as client:
                streams = [client.stream("AB") for _ in range(8)]
                starts = [await anext(stream) for stream in streams]
                processes[0].send_signal(signal.SIGTERM)  # while it has some of them
                is_stopped = asyncio.ensure_future(asyncio.to_thread(processes[0].communicate))
                rests = asyncio.gather(*map(_rest_of, streams))
                texts: list[str] = []
                while not texts or not is_stopped.done():
                    texts += [each.text for each in await asyncio.gather(*[client.generate("AB") for _ in range(8)])]
                texts += [start + rest for start, rest in zip(starts, await rests, strict=True)]
        _, log = await is_stopped
    assert processes[0].returncode == 0
    assert set(texts) == {"a" * 29 + "!"}
    assert b"Generate" in log  # both servers had calls


async def _rest_of(stream: AsyncStream) -> str:
    return "".join([text async for text in stream])


@asynccontextmanager
async def http_through_envoy(engine: FakeEngine, folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """Serve an engine through Envoy; yield an HTTP client."""
    async with (
        proxied("envoy", engine, folder) as proxy,
        httpx.AsyncClient(base_url=f"http://{proxy.address}", trust_env=False) as client,
    ):
        yield client


async def test_browsers_call_over_grpc_web(tmp_path: Path) -> None:
    origin = "http://localhost:3000"
    async with http_through_envoy(FakeEngine(more("a"), last("b")), tmp_path) as browser:
        path = f"/{NAME}/GenerateStream"
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        preflight = await browser.options(path, headers=asked)
        foreign = await browser.options(path, headers=asked | {"Origin": "http://evil.example"})
        raw = REQUEST.SerializeToString()
        body = base64.b64encode(b"\0" + len(raw).to_bytes(4, "big") + raw)
        kind = "application/grpc-web-text"
        headers = {"Content-Type": kind, "Accept": kind, "X-Grpc-Web": "1", "Origin": origin}
        response = await browser.post(path, content=body, headers=headers)
    assert preflight.headers["access-control-allow-origin"] == origin
    assert "access-control-allow-origin" not in foreign.headers
    assert "grpc-status" in response.headers["access-control-expose-headers"]
    messages, trailers = parse_grpc_web(response.text)
    assert [choice.text for message in messages for choice in message.choices] == ["a", "b"]
    assert trailers["grpc-status"] == "0"


def parse_grpc_web(text: str) -> tuple[list[pb.GenerateStreamResponse], dict[str, str]]:
    """Return the messages and the trailers of a body in base64, which may be padded after each part."""
    raw = b"".join(base64.b64decode(part + "=" * (-len(part) % 4)) for part in text.replace("=", " ").split())
    messages, trailers = [], dict[str, str]()
    while raw:
        kind, size = raw[0], int.from_bytes(raw[1:5], "big")
        payload, raw = raw[5 : 5 + size], raw[5 + size :]
        if kind & 0x80:
            trailers = dict(line.split(":", 1) for line in payload.decode().splitlines())
        else:
            messages.append(pb.GenerateStreamResponse.FromString(payload))
    return messages, trailers


async def test_json_over_http_is_transcoded(tmp_path: Path) -> None:
    async with http_through_envoy(FakeEngine(more("a"), last("b")), tmp_path) as client:
        body = {"prompt": "AB", "max_tokens": 2}
        whole = await client.post(f"/{NAME}/Generate", json=body)
        stream = await client.post(f"/{NAME}/GenerateStream", json=body)
        refused = await client.post(f"/{NAME}/Generate", json=body | {"temperature": -1})
        unknown = await client.post(f"/{NAME}/Nothing", json=body)
    assert whole.status_code == 200
    assert whole.json()["choices"][0]["text"] == "ab"
    assert whole.json()["usage"]["prompt_tokens"] == 2
    lines = [json.loads(line) for line in stream.text.splitlines()]
    assert [choice["text"] for line in lines for choice in line.get("choices", [])] == ["a", "b"]
    assert refused.status_code == 400
    assert refused.json()["message"] == "`temperature` must be between 0 and 2, not -1.0"
    assert refused.json()["details"][1]["field_violations"][0]["field"] == "temperature"
    assert unknown.status_code == 404


def test_the_descriptors_of_the_transcoder_are_up_to_date() -> None:
    folder = Path(__file__).parents[2] / "deploy/envoy"
    command = [sys.executable, str(folder / "descriptors.py")]
    fresh = subprocess.run(command, check=True, capture_output=True).stdout
    committed = (folder / "yuan.binpb").read_bytes()
    assert FileDescriptorSet.FromString(committed) == FileDescriptorSet.FromString(fresh)
