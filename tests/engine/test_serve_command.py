"""The command `yuan-grpc serve` as a process: startup, shutdown, and the death of its engine."""

import json
import os
import re
import signal
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Semaphore, Thread

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2
from otlp_collector import collect_spans
from ports import free_port
from prometheus_client.parser import text_string_to_metric_families
from server_process import COMMAND, ENVIRONMENT, ServerProcess

from yuan_grpc.v1 import yuan_pb2 as pb

pytestmark = pytest.mark.engine

ENDLESS = pb.GenerateRequest(prompt="世界上最高的山是什么", max_tokens=2000, ignore_eos=True)
LONG = pb.GenerateRequest(prompt="世界上最高的山是什么", max_tokens=200, ignore_eos=True)
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def start() -> Iterator[Callable[..., ServerProcess]]:
    """A function that starts a server, which is killed after the test."""
    started: list[ServerProcess] = []

    def start(*options: str, **environment: str) -> ServerProcess:
        started.append(ServerProcess(*options, **environment))
        return started[-1]

    yield start
    for server in started:
        server.kill()


def have_exited(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=10)
    return not alive


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a path that is short enough for sockets in it."""
    with TemporaryDirectory() as folder:
        yield Path(folder)


def test_the_server_finishes_running_calls_and_leaves_no_process_and_no_temporary_file(
    start: Callable[..., ServerProcess], folder: Path
) -> None:
    server = start(TMPDIR=str(folder), XDG_CACHE_HOME=str(folder / "cache"))
    server.wait_until_serving()
    engine_processes = server.engine_processes()
    assert any(path.is_socket() for path in folder.glob("yuan-grpc-*/*"))
    call = server.stub.GenerateStream(LONG)
    messages = [next(call)]
    os.killpg(server.process.pid, signal.SIGTERM)
    messages += call
    assert messages[-1].usage.completion_tokens == 200
    status, log = server.wait_for_exit()
    assert status == 0, log
    assert "Traceback" not in log
    assert "WARNING" not in log  # as when a process has to be killed
    assert len((server.start_log + log).splitlines()) == 14  # eleven of the start, one of the call, two of the stop
    assert engine_processes
    assert have_exited(engine_processes)
    assert [path.name for path in folder.iterdir()] == ["cache"]
    created = [folder / "cache" / "yuan-grpc", *(folder / "cache" / "yuan-grpc").rglob("*")]
    assert [path for path in created if path.stat().st_mode & 0o077] == []


def test_a_dead_engine_ends_calls_and_the_server(start: Callable[..., ServerProcess]) -> None:
    server = start()
    server.wait_until_serving()
    engine_processes = server.engine_processes()
    for process in engine_processes:
        process.suspend()  # otherwise the call could finish before the engine is killed
    call = server.stub.GenerateStream(ENDLESS)
    next(call)
    for process in engine_processes:
        process.kill()
    with pytest.raises(grpc.RpcError) as raised:
        list(call)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    assert raised.value.details() == "the engine was lost while the request was running"
    status, log = server.wait_for_exit()
    assert status == 1
    assert "the engine was lost" in log
    assert have_exited(engine_processes)


STALL_FLAGS = ("--stall-seconds", "2", "--stall-exit-seconds", "4", "--grace-seconds", "5")
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
TRACE = [("traceparent", f"00-{TRACE_ID}-b7ad6b7169203331-01")]
GATEWAY_METRICS = {
    "vllm:num_requests_waiting",
    "vllm:num_requests_running",
    "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info",
    "vllm:lora_requests_info",
}
"""Metrics that the Gateway API Inference Extension reads."""


def test_a_stalled_engine_is_seen_and_ends_the_server_without_traces(
    start: Callable[..., ServerProcess], folder: Path
) -> None:
    """One server for the metrics, traces and JSON log of a real engine too, because a start takes long."""
    port = free_port()
    with collect_spans() as (endpoint, spans):
        server = start(
            *("--metrics-port", str(port), "--log-format", "json", "--enable-lora", *STALL_FLAGS),
            *("--otlp-traces-endpoint", endpoint),
            TMPDIR=str(folder),
            XDG_CACHE_HOME=str(folder / "cache"),
        )
        server.wait_until_serving()
        check_timings(server)
        check_metrics(port)
        engine_processes = server.engine_processes()
        core = max(engine_processes, key=lambda process: process.memory_info().rss)
        core.suspend()
        slow = server.stub.Generate.future(pb.GenerateRequest(prompt="一", max_tokens=2, ignore_eos=True))
        server.wait_for(health_pb2.HealthCheckResponse.NOT_SERVING)
        with pytest.raises(grpc.RpcError) as raised:
            server.stub.Generate(ENDLESS)
        assert raised.value.details() == "the engine makes no progress"
        core.resume()
        server.wait_until_serving()
        assert slow.result(timeout=60).usage.completion_tokens == 2
        stream = server.stub.GenerateStream(ENDLESS)
        next(stream)
        core.suspend()
        with pytest.raises(grpc.RpcError) as raised:
            list(stream)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        status, log = server.wait_for_exit()
    assert status == 1, log
    assert have_exited(engine_processes)
    assert [path.name for path in folder.iterdir()] == ["cache"]
    by_id = {span.span_id: span for span in spans if span.trace_id == TRACE_ID}
    (engine_span,) = [span for span in by_id.values() if span.name == "llm_request"]
    assert by_id[engine_span.parent_id].name == "yuan.v1.YuanService/Generate"
    lines = [json.loads(line) for line in (server.start_log + log).splitlines()]
    assert {"time", "level", "logger", "message"} <= set.intersection(*(set(line) for line in lines))
    (call,) = [line for line in lines if line.get("trace_id") == TRACE_ID]
    assert (call["id"], call["prompt_tokens"], call["completion_tokens"]) == ("timed", 4, 4)


def check_timings(server: ServerProcess) -> None:
    request = pb.GenerateRequest(
        prompt="世界上最高的山是什么", request_id="timed", max_tokens=4, ignore_eos=True, return_timings=True
    )
    timings = server.stub.Generate(request, metadata=TRACE).timings
    seconds = {field.name: value.ToTimedelta().total_seconds() for field, value in timings.ListFields()}
    assert seconds.keys() == {"queue", "prefill", "first_token", "decode", "total"}
    assert 0 < seconds["prefill"] < seconds["first_token"] < seconds["total"]
    assert seconds["queue"] < seconds["first_token"]


def check_metrics(port: int) -> None:
    """Check that a scrape has the gateway's metrics, all of docs/observe.md, and all of the dashboard."""
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"http://127.0.0.1:{port}/metrics") as page:
        families = [*text_string_to_metric_families(page.read().decode())]
    scraped = {sample.name for family in families for sample in family.samples} | {family.name for family in families}
    scraped |= {f"{family.name}_total" for family in families if family.type == "counter"}  # also without samples
    assert scraped >= GATEWAY_METRICS
    documented = set(re.findall(r"^\| `([a-z_:]+)`", (REPOSITORY / "docs/observe.md").read_text(), re.MULTILINE))
    assert {name for name in documented if name.startswith("vllm:")} <= scraped
    dashboard = (REPOSITORY / "deploy/grafana/dashboard.json").read_text()
    names = set(re.findall(r"(?:vllm:|yuan_grpc_|process_)[a-z_]+", dashboard))
    assert names <= scraped | {f"{name}_bucket" for name in scraped}


def test_a_killed_server_takes_its_engine_with_it(start: Callable[..., ServerProcess]) -> None:
    server = start()
    server.wait_until_serving()
    engine_processes = server.engine_processes()
    server.process.kill()
    server.wait_for_exit()
    assert have_exited(engine_processes)


def test_a_lower_priority_number_is_scheduled_first_and_ctrl_c_lets_calls_finish(
    start: Callable[..., ServerProcess],
) -> None:
    """The whole process group gets the signal, as from a terminal."""
    server = start("--scheduling-policy", "priority", "--max-num-seqs", "1")
    server.wait_until_serving()
    running = server.stub.GenerateStream(ENDLESS)
    next(running)
    next(running)  # it is scheduled, so the others wait
    order, finished = list[int](), Semaphore(0)

    def read(priority: int, messages: Iterator[pb.GenerateStreamResponse]) -> None:
        for _ in messages:
            order.append(priority)
        finished.release()

    for priority in (5, 1):
        messages = server.stub.GenerateStream(
            pb.GenerateRequest(prompt="一", max_tokens=200, ignore_eos=True, priority=priority)
        )
        next(messages)  # it is queued
        Thread(target=read, args=(priority, messages)).start()
    running.cancel()
    assert finished.acquire(timeout=60)
    assert finished.acquire(timeout=60)
    assert order.index(5) >= max(1, order.count(1) // 2)
    engine_processes, call = server.engine_processes(), server.stub.GenerateStream(LONG)
    next(call)
    os.killpg(server.process.pid, signal.SIGINT)
    assert list(call)[-1].usage.completion_tokens == 200
    status, log = server.wait_for_exit()
    assert status == 0, log
    assert "Traceback" not in log
    assert "WARNING" not in log  # as when a process has to be killed
    assert have_exited(engine_processes)


def test_the_server_can_be_stopped_while_the_model_loads(start: Callable[..., ServerProcess]) -> None:
    server = start()
    with pytest.raises(grpc.RpcError) as raised:
        server.stub.Generate(ENDLESS)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    while not (engine_processes := server.engine_processes()):
        assert server.process.poll() is None
    server.process.send_signal(signal.SIGTERM)
    status, log = server.wait_for_exit()
    assert status == 0, log
    assert have_exited(engine_processes)


def test_a_missing_model_is_reported_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run([*COMMAND, "--model", str(tmp_path)], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr == f"yuan-grpc: cannot start: {tmp_path} has no config.json: name the folder of a checkpoint\n"


def test_a_cache_folder_that_another_user_could_have_filled_is_refused(tmp_path: Path) -> None:
    planted = tmp_path / "yuan-grpc"
    planted.mkdir()
    planted.chmod(0o777)
    done = subprocess.run(COMMAND, env=ENVIRONMENT | {"XDG_CACHE_HOME": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1
    cause = f"{planted} must be writable by its owner only, not have mode 0777: remove it"
    assert done.stderr == f"yuan-grpc: cannot start: {cause}\n"


def test_a_full_disk_for_the_log_does_not_end_the_start() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    done = subprocess.run([*COMMAND, "--max-model-len", "none"], stderr=full)
    os.close(full)
    assert done.returncode == 1  # of the value, which is parsed after the banner is printed


def test_an_unknown_option_is_reported_in_one_line() -> None:
    done = subprocess.run([*COMMAND, "--no-such-option", "1"], capture_output=True, text=True)
    assert done.returncode == 2
    cause = "unrecognized option --no-such-option; see yuan-grpc serve --help"
    assert done.stderr == f"yuan-grpc: cannot start: {cause}\n"
