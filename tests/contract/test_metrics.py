"""The metrics port, with a real server and a fake engine, read by Prometheus' own parser."""

import asyncio
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from fake_engine import FakeEngine, last, more
from grpc_health.v1 import health_pb2
from health_client import health_stub
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.parser import text_string_to_metric_families

from yuan_grpc.server.core.access_log import Outcome
from yuan_grpc.server.core.request_stats import RequestStats
from yuan_grpc.server.engine.types import ChoiceDelta, StepOutput
from yuan_grpc.server.server import serve
from yuan_grpc.server.settings import DEMO, Settings
from yuan_grpc.server.settings.telemetry import TelemetrySettings
from yuan_grpc.server.start_error import StartError
from yuan_grpc.server.telemetry.call_metrics import MAX_CALLERS, CallMetrics
from yuan_grpc.server.telemetry.metrics_server import CONNECTION_SECONDS, MAX_CONNECTIONS, MetricsServer
from yuan_grpc.server.telemetry.server_metrics import ServerMetrics
from yuan_grpc.v1 import yuan_pb2 as pb
from yuan_grpc.v1 import yuan_pb2_grpc

REPOSITORY = Path(__file__).parents[2]
Samples = Mapping[tuple[str, tuple[tuple[str, str], ...]], float]


def parse(text: str) -> Samples:
    """Return the value of each sample, by name and labels."""
    families = text_string_to_metric_families(text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples.get((f"yuan_grpc_{name}", tuple(sorted(labels.items()))), 0.0)


async def scrape(port: int) -> Samples:
    async with httpx.AsyncClient(trust_env=False) as client:
        response = await client.get(f"http://127.0.0.1:{port}/metrics")
    assert response.status_code == 200
    return parse(response.text)


@pytest.fixture
def ports() -> tuple[int, int]:
    """Two free ports."""
    with socket.socket() as first, socket.socket() as second:
        for unused in (first, second):
            unused.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]


@asynccontextmanager
async def serve_metrics(engine: FakeEngine, ports: tuple[int, int]) -> AsyncIterator[grpc.aio.Channel]:
    """Serve an engine with a metrics port; yield a channel when the server is ready."""
    engine.may_start.set()
    telemetry = TelemetrySettings(metrics_port=ports[1])
    settings = Settings(DEMO, "127.0.0.1", ports[0], 0, (), telemetry=telemetry)
    status = asyncio.ensure_future(serve(settings, engine))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{ports[0]}") as channel:
        watch = health_stub(channel).Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True)
        while (await watch.read()).status != health_pb2.HealthCheckResponse.SERVING:
            pass
        try:
            yield channel
        finally:
            if not status.done():
                os.kill(os.getpid(), signal.SIGTERM)
            assert await status == 0


async def failure_of(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value.code()


async def _read_all(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_calls_are_counted_by_method_code_and_reason(ports: tuple[int, int]) -> None:
    engine = FakeEngine(more("ab"), last("c"))
    async with serve_metrics(engine, ports) as channel:
        stub, before = yuan_pb2_grpc.YuanServiceStub(channel), await scrape(ports[1])
        await stub.Generate(pb.GenerateRequest(prompt="AB"))
        async for _ in stub.GenerateStream(pb.GenerateRequest(prompt="ABC")):
            pass
        assert await failure_of(stub.Generate(pb.GenerateRequest())) is grpc.StatusCode.INVALID_ARGUMENT
        after = await scrape(ports[1])

    def growth(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    assert growth("calls_total", method="Generate", code="OK", caller="") == 1
    assert growth("calls_total", method="Generate", code="INVALID_ARGUMENT", caller="") == 1
    assert growth("calls_total", method="GenerateStream", code="OK", caller="") == 1
    assert growth("errors_total", method="Generate", reason="INVALID_REQUEST") == 1
    assert growth("prompt_tokens_total", model="fake", caller="") == 5
    assert growth("completion_tokens_total", model="fake", caller="") == 6
    assert growth("call_seconds_count", method="Generate") == 2
    assert growth("time_to_first_token_seconds_count") == 2
    assert growth("stream_messages_total") == 2
    assert growth("coalesced_messages_total") == 1
    assert growth("inter_token_seconds_count") == 1
    assert value(after, "calls_in_flight", method="Generate") == 0
    assert value(after, "ready") == 1
    assert value(after, "start_seconds") > 0


async def test_running_and_cancelled_calls_are_counted(ports: tuple[int, int]) -> None:
    engine = FakeEngine(more("a"), hangs=True)
    async with serve_metrics(engine, ports) as channel:
        stub, before = yuan_pb2_grpc.YuanServiceStub(channel), await scrape(ports[1])
        call = stub.GenerateStream(pb.GenerateRequest(prompt="AB"))
        request_id = (await call.read()).request_id
        running = await scrape(ports[1])
        await stub.Abort(pb.AbortRequest(request_id=request_id))
        assert await failure_of(_read_all(call)) is grpc.StatusCode.CANCELLED
        call = stub.GenerateStream(pb.GenerateRequest(prompt="AB"))
        await call.read()
        engine.freed.clear()
        call.cancel()
        await engine.freed.wait()
        late = stub.Generate(pb.GenerateRequest(prompt="AB"), timeout=0.2)
        assert await failure_of(late) is grpc.StatusCode.DEADLINE_EXCEEDED
        while value(after := await scrape(ports[1]), "calls_in_flight", method="Generate"):
            pass  # until the server has noticed the deadline

    def growth(cause: str, method: str) -> float:
        labels = {"cause": cause, "method": method}
        return value(after, "cancellations_total", **labels) - value(before, "cancellations_total", **labels)

    assert value(running, "calls_in_flight", method="GenerateStream") == 1
    assert value(after, "calls_in_flight", method="GenerateStream") == 0
    assert growth("abort", "GenerateStream") == 1
    assert growth("client", "GenerateStream") == 1
    assert growth("deadline", "Generate") == 1


async def test_requests_of_a_batch_are_calls_of_their_own(ports: tuple[int, int]) -> None:
    async with serve_metrics(FakeEngine(last("a")), ports) as channel:
        stub, before = yuan_pb2_grpc.YuanServiceStub(channel), await scrape(ports[1])
        items = [pb.GenerateBatchRequest(request=pb.GenerateRequest(prompt=text)) for text in ("A", "", "B")]
        assert [result async for result in stub.GenerateBatch(iter(items))]
        after = await scrape(ports[1])

    def growth(method: str, code: str) -> float:
        labels = {"method": method, "code": code, "caller": ""}
        return value(after, "calls_total", **labels) - value(before, "calls_total", **labels)

    assert growth("GenerateBatch", "OK") == 1
    assert growth("GenerateBatch.request", "OK") == 2
    assert growth("GenerateBatch.request", "INVALID_ARGUMENT") == 1


async def test_a_taken_metrics_port_ends_the_start(ports: tuple[int, int]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        settings = Settings(DEMO, "127.0.0.1", ports[0], 0, (), telemetry=TelemetrySettings(metrics_port=port))
        with pytest.raises(StartError, match=f"cannot listen on 127.0.0.1:{port}"):
            await serve(settings, FakeEngine())


async def test_without_the_option_no_call_is_measured(ports: tuple[int, int]) -> None:
    from yuan_grpc.server.core import access_log

    assert access_log._observers == []
    async with serve_metrics(FakeEngine(), ports):
        assert len(access_log._observers) == 1
    assert access_log._observers == []


def test_callers_beyond_a_limit_share_a_label() -> None:
    registry = CollectorRegistry()
    metrics = CallMetrics(registry)
    for number in range(MAX_CALLERS + 2):
        outcome = Outcome("Generate")
        outcome.caller, outcome.code = f"team-{number}", grpc.StatusCode.OK
        metrics.begin(outcome)
        metrics.end(outcome, 0.1)

    def calls(caller: str) -> float | None:
        labels = {"method": "Generate", "code": "OK", "caller": caller}
        return registry.get_sample_value("yuan_grpc_calls_total", labels)

    assert calls("team-0") == 1
    assert calls(f"team-{MAX_CALLERS}") is None
    assert calls("other") == 2


def test_times_between_messages_are_counted_in_their_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    registry, clock = CollectorRegistry(), iter([0.0, 0.1, 0.104, 0.604])
    monkeypatch.setattr("yuan_grpc.server.core.request_stats.monotonic", lambda: next(clock))
    stats, outcome = RequestStats(stream=True), Outcome("GenerateStream")
    for _ in range(3):
        stats.observe(StepOutput([ChoiceDelta(0, "a", (1,))]))
    outcome.begin(stats, "yuan", 1)
    metrics = CallMetrics(registry)
    metrics.begin(outcome)
    metrics.end(outcome, 0.7)

    def bucket(bound: str) -> float | None:
        return registry.get_sample_value("yuan_grpc_inter_token_seconds_bucket", {"le": bound})

    assert [bucket(bound) for bound in ("0.002", "0.005", "0.5", "1.0", "+Inf")] == [0, 1, 2, 2, 2]
    total = registry.get_sample_value("yuan_grpc_inter_token_seconds_sum")
    assert total == pytest.approx(0.504)


OPEN_METRICS = "application/openmetrics-text;version=1.0.0;escaping=underscores,text/plain;version=0.0.4;q=0.5"


def test_names_have_their_colon_also_for_a_prometheus_that_prefers_open_metrics() -> None:
    registry = CollectorRegistry()
    Gauge("vllm:num_requests_waiting", "Waiting.", registry=registry).set(3)
    server = MetricsServer("127.0.0.1", 0, registry)
    server.start()
    try:
        with httpx.Client(trust_env=False, base_url=f"http://127.0.0.1:{server.port}") as client:
            response = client.get("/metrics", headers={"accept": OPEN_METRICS})
            assert client.get("/").status_code == 404
    finally:
        server.close()
    assert parse(response.text) == {("vllm:num_requests_waiting", ()): 3}
    assert response.headers["content-type"].startswith("text/plain")


def test_silent_clients_do_not_keep_others_from_the_metrics() -> None:
    server = MetricsServer("127.0.0.1", 0, CollectorRegistry())
    server.start()
    address = ("127.0.0.1", server.port)
    silent = [socket.create_connection(address) for _ in range(MAX_CONNECTIONS - 1)]
    try:
        with httpx.Client(trust_env=False) as client:
            assert client.get(f"http://127.0.0.1:{server.port}/metrics").status_code == 200
        # Two for the last place: the server may still hold it for the client above when the first one arrives.
        last = [socket.create_connection(address) for _ in range(2)]
        silent += last
        closed, _, _ = select.select(last, [], [], CONNECTION_SECONDS / 2)
        assert closed
        assert all(connection.recv(1) == b"" for connection in closed)
    finally:
        for connection in silent:
            connection.close()
        server.close()


def test_the_documentation_has_each_metric_with_its_labels_and_the_dashboard_no_other() -> None:
    registry = CollectorRegistry()
    CallMetrics(registry)
    ServerMetrics(registry)
    text = (REPOSITORY / "docs/observe.md").read_text("utf-8")
    rows = re.findall(r"^\| `(yuan_grpc_[a-z_]+)` \| ([a-z, ]*)\|", text, re.MULTILINE)
    documented = {name.removesuffix("_total"): labels.strip() for name, labels in rows}
    collectors: set[Any] = set(registry._collector_to_names)
    assert documented == {collector._name: ", ".join(collector._labelnames) for collector in collectors}
    for file in ("grafana/dashboard.json", "prometheus/yuan-grpc.rules.yaml"):
        used = set(re.findall(r"yuan_grpc_[a-z_]+", (REPOSITORY / "deploy" / file).read_text("utf-8")))
        assert used <= {name + suffix for name in documented for suffix in ("", "_total", "_bucket")}


_PROCESS = """
from yuan_grpc.server.core.access_log import Outcome
from yuan_grpc.server.telemetry.call_metrics import CallMetrics
metrics, outcome = CallMetrics(), Outcome("Generate")
for _ in range(2):
    metrics.begin(outcome)
metrics.end(outcome, 0.1)
"""
_READER = """
from prometheus_client import generate_latest
from yuan_grpc.server.telemetry.metrics_server import source_registry
print(generate_latest(source_registry()).decode())
"""


@pytest.mark.timeout(60)
def test_the_metrics_of_several_processes_are_merged_by_another_one(tmp_path: Path) -> None:
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", _PROCESS], env=environment, check=True)
    done = subprocess.run([sys.executable, "-c", _READER], env=environment, check=True, capture_output=True, text=True)
    samples = parse(done.stdout)
    assert value(samples, "calls_total", method="Generate", code="CANCELLED", caller="") == 2
    assert value(samples, "calls_in_flight", method="Generate") == 2
    assert value(samples, "call_seconds_count", method="Generate") == 2
