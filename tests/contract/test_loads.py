"""The load of the engine: `GetLoads`, ORCA reports, and gRPC clients that balance by them."""

import asyncio
import base64
import json
import re
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_engine import FakeEngine, last, more
from servers import serve_grpc

from yuan_grpc.server.engine.load import EngineLoad
from yuan_grpc.server.errors import OverloadedError
from yuan_grpc.server.grpc import orca
from yuan_grpc.server.grpc.servicer import NAME
from yuan_grpc.server.settings.mesh import MeshSettings
from yuan_grpc.v1 import yuan_pb2 as pb
from yuan_grpc.v1 import yuan_pb2_grpc

REQUEST = pb.GenerateRequest(prompt="AB")
REPORTS = MeshSettings(load_reports=True)
LOADS = [
    EngineLoad(0, num_running=3, num_waiting=2, max_num_seqs=4, kv_cache_usage=0.5, tokens_per_second=90),
    EngineLoad(1, num_running=1, max_num_seqs=4, kv_cache_usage=0.25),
]


@asynccontextmanager
async def connect(engine: FakeEngine, settings: MeshSettings = REPORTS) -> AsyncIterator[grpc.aio.Channel]:
    """Serve an engine; yield a channel to its server."""
    async with serve_grpc(engine, mesh=settings) as address, grpc.aio.insecure_channel(address) as channel:
        yield channel


def stub_of(channel: grpc.aio.Channel) -> Any:
    return yuan_pb2_grpc.YuanServiceStub(channel)


async def trailers_of(address: str, rpc: str) -> dict[str, str]:
    """Return the trailers of a call as Go sees them: the C core of gRPC keeps reports from its callers.

    Call 1 of buf is reflection, call 2 the one of the method.
    """
    process = await asyncio.create_subprocess_exec(
        *(str(Path(sys.executable).with_name("buf")), "curl", "--verbose", "--protocol", "grpc"),
        *("--http2-prior-knowledge", "--data", '{"prompt": "AB"}', f"http://{address}/{NAME}/{rpc}"),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    _, log = await process.communicate()
    return {name.lower(): value for name, value in re.findall(r"< \(#2\) ([\w-]+): (.*)", log.decode())}


def report_in(trailers: dict[str, str]) -> Any:
    """Return the report in trailers."""
    text = trailers[orca.TRAILER]
    return orca.OrcaLoadReport.FromString(base64.b64decode(text + "=" * (-len(text) % 4)))


async def test_get_loads_returns_the_load_of_each_rank() -> None:
    engine = FakeEngine()
    engine.loads = LOADS
    async with connect(engine, MeshSettings()) as channel:
        response = await stub_of(channel).GetLoads(pb.GetLoadsRequest())
    assert response.loads[0] == pb.EngineLoad(
        num_running_reqs=3, num_waiting_reqs=2, max_num_seqs=4, kv_cache_usage=0.5, tokens_per_second=90
    )
    assert [load.dp_rank for load in response.loads] == [0, 1]
    assert response.utilization == 6 / 8


@pytest.mark.parametrize(
    ("is_ready", "code"), [(True, grpc.StatusCode.FAILED_PRECONDITION), (False, grpc.StatusCode.UNAVAILABLE)]
)
async def test_an_unknown_load_is_an_error(is_ready: bool, code: grpc.StatusCode) -> None:
    engine = FakeEngine(is_ready=is_ready)
    engine.loads = []
    async with connect(engine) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub_of(channel).GetLoads(pb.GetLoadsRequest())
    assert raised.value.code() is code


@pytest.mark.timeout(60)
async def test_trailers_of_every_call_have_a_report() -> None:
    engine = FakeEngine(more("a"), last("b"))
    engine.loads = LOADS
    async with serve_grpc(engine, mesh=REPORTS) as address:
        reports = [report_in(await trailers_of(address, rpc)) for rpc in ("Generate", "GenerateStream")]
    for report in reports:
        assert report.application_utilization == 6 / 8
        assert report.mem_utilization == 0.375
        assert dict(report.named_metrics) == {
            "kv_cache_usage_perc": 0.375,
            "num_requests_running": 4,
            "num_requests_waiting": 2,
        }
        assert report.rps_fractional > 0
        assert report.eps == 0


@pytest.mark.timeout(60)
async def test_failed_calls_have_a_report_with_the_details_of_their_error() -> None:
    engine = FakeEngine(OverloadedError("the request queue is full (limit 1)"))
    async with serve_grpc(engine, mesh=REPORTS) as address:
        trailers = await trailers_of(address, "Generate")
    assert report_in(trailers).eps > 0
    assert trailers["grpc-status"] == "8"
    assert trailers.keys() >= {"grpc-status-details-bin", "grpc-retry-pushback-ms", "x-request-id"}


@pytest.mark.timeout(60)
async def test_nothing_is_reported_unless_it_is_enabled() -> None:
    async with serve_grpc(FakeEngine(last())) as address, grpc.aio.insecure_channel(address) as channel:
        trailers = await trailers_of(address, "Generate")
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            async for _ in stream_reports(channel):
                pass
    assert trailers["grpc-status"] == "0"
    assert orca.TRAILER not in trailers
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


def stream_reports(channel: grpc.aio.Channel) -> Any:
    """Start a call of the service for reports."""
    method: Any = channel.unary_stream(
        f"/{orca.SERVICE}/{orca.METHOD}",
        request_serializer=orca.OrcaLoadReportRequest.SerializeToString,
        response_deserializer=orca.OrcaLoadReport.FromString,
    )
    return method(orca.OrcaLoadReportRequest())


async def test_the_service_reports_the_current_load() -> None:
    engine = FakeEngine(is_ready=False)
    async with connect(engine) as channel:
        call = stream_reports(channel)
        assert (await call.read()).application_utilization == 0
        engine.is_ready, engine.loads = True, LOADS
        assert (await call.read()).application_utilization == 6 / 8
        call.cancel()


def balancing_channel(addresses: list[str], *, out_of_band: bool) -> grpc.aio.Channel:
    """Return a channel with gRPC's policy that weighs servers by their reports, without its time to settle."""
    policy = {
        "enableOobLoadReport": out_of_band,
        "oobReportingPeriod": "1s",
        "blackoutPeriod": "0s",
        "weightUpdatePeriod": "0.1s",
    }
    config = json.dumps({"loadBalancingConfig": [{"weighted_round_robin": policy}]})
    options = [("grpc.service_config", config), ("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.insecure_channel(f"ipv4:{','.join(addresses)}", options=options)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("out_of_band", [False, True], ids=["trailers", "service"])
async def test_grpc_clients_send_more_calls_to_the_server_with_less_load(out_of_band: bool) -> None:
    idle, busy = FakeEngine(last()), FakeEngine(last())
    idle.loads = [EngineLoad(num_running=1, max_num_seqs=10)]
    busy.loads = [EngineLoad(num_running=9, max_num_seqs=10)]
    async with AsyncExitStack() as stack:
        addresses = [await stack.enter_async_context(serve_grpc(engine, mesh=REPORTS)) for engine in (idle, busy)]
        channel = await stack.enter_async_context(balancing_channel(addresses, out_of_band=out_of_band))
        counts = Counter[str]()
        while counts["idle"] < 3 * counts["busy"] or counts["idle"] + counts["busy"] < 40:  # the timeout is the limit
            before = len(idle.requests), len(busy.requests)
            await asyncio.gather(*(stub_of(channel).Generate(REQUEST) for _ in range(40)))
            counts = Counter(idle=len(idle.requests) - before[0], busy=len(busy.requests) - before[1])
            await asyncio.sleep(0.1)
    assert counts["idle"] + counts["busy"] == 40


def test_calls_per_second_are_those_of_the_last_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("yuan_grpc.server.grpc.orca.time.monotonic", lambda: now)
    rate = orca.CallRate()
    for step in range(200):
        now = 1000 + step / 10
        rate.count(failed=step % 4 == 0)
    calls, failures = rate.read()
    assert (calls, failures) == (10, 2.5)
    now += 20
    assert rate.read() == (0, 0)
