"""The command `yuan-grpc serve` as a process: startup, shutdown, and the death of its engine."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Semaphore, Thread

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2
from health_client import health_stub

from yuan_grpc.v1 import yuan_pb2 as pb
from yuan_grpc.v1 import yuan_pb2_grpc

pytestmark = pytest.mark.engine

ENDLESS = pb.GenerateRequest(prompt="世界上最高的山是什么", max_tokens=2000, ignore_eos=True)
COMMAND = (sys.executable, "-m", "yuan_grpc", "serve", "--port", "0")
ENVIRONMENT = dict(os.environ)  # before an engine in this process sets variables


class ServerProcess:
    """A `yuan-grpc serve` process."""

    def __init__(self, *options: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, *options],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=ENVIRONMENT | environment,
            umask=0o022,
        )
        assert self.process.stderr is not None
        log = ""
        while not (found := re.search(r"gRPC listening on port (\d+)", log)):
            line = self.process.stderr.readline()
            assert line, log
            log += line
        assert log.startswith("yuan-grpc ")
        self.start_log = log
        self.channel = grpc.insecure_channel(f"127.0.0.1:{found[1]}")
        self.stub = yuan_pb2_grpc.YuanServiceStub(self.channel)

    def wait_until_serving(self) -> None:
        """Return when health is SERVING."""
        for response in health_stub(self.channel).Watch(health_pb2.HealthCheckRequest()):
            if response.status == health_pb2.HealthCheckResponse.SERVING:
                return

    def engine_processes(self) -> list[psutil.Process]:
        """Return the processes of the engine."""
        children: list[psutil.Process] = psutil.Process(self.process.pid).children(recursive=True)
        return children

    def wait_for_exit(self) -> tuple[int, str]:
        """Return the exit status and the remaining log."""
        _, log = self.process.communicate(timeout=60)
        self.channel.close()
        return self.process.returncode, log


@pytest.fixture
def start() -> Iterator[Callable[..., ServerProcess]]:
    """A function that starts a server, which is killed after the test."""
    started: list[ServerProcess] = []

    def start(*options: str, **environment: str) -> ServerProcess:
        started.append(ServerProcess(*options, **environment))
        return started[-1]

    yield start
    for server in started:
        is_running = server.process.poll() is None
        for process in (*server.engine_processes(), server.process) if is_running else ():
            process.kill()
        assert server.process.stderr is not None
        server.process.stderr.close()
        server.process.wait()


def have_exited(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=10)
    return not alive


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a path that is short enough for sockets in it."""
    with TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.parametrize("stop_signal", [signal.SIGTERM, signal.SIGINT])
def test_the_server_finishes_running_calls_and_leaves_no_process_and_no_temporary_file(
    start: Callable[..., ServerProcess], folder: Path, stop_signal: signal.Signals
) -> None:
    """The whole process group gets the signal, as with Ctrl-C in a terminal."""
    server = start(TMPDIR=str(folder), XDG_CACHE_HOME=str(folder / "cache"))
    server.wait_until_serving()
    engine_processes = server.engine_processes()
    assert any(path.is_socket() for path in folder.glob("yuan-grpc-*/*"))
    call = server.stub.GenerateStream(ENDLESS)
    messages = [next(call)]
    os.killpg(server.process.pid, stop_signal)
    messages += call
    assert messages[-1].usage.completion_tokens == 2000
    status, log = server.wait_for_exit()
    assert status == 0, log
    assert "Traceback" not in log
    assert "WARNING" not in log  # as when a process has to be killed
    assert len((server.start_log + log).splitlines()) == 13  # ten of the start, one of the call, two of the stop
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


def test_a_killed_server_takes_its_engine_with_it(start: Callable[..., ServerProcess]) -> None:
    server = start()
    server.wait_until_serving()
    engine_processes = server.engine_processes()
    server.process.kill()
    server.wait_for_exit()
    assert have_exited(engine_processes)


def test_a_lower_priority_number_is_scheduled_first(start: Callable[..., ServerProcess]) -> None:
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
    server.process.send_signal(signal.SIGTERM)
    assert server.wait_for_exit()[0] == 0


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


def test_an_incomplete_override_is_reported_in_one_line() -> None:
    override = '--hf-overrides={"rope_parameters": {"rope_theta": 500000}}'
    done = subprocess.run([*COMMAND, override], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("an object in `--hf-overrides` must be complete, and 'rope_type' is missing\n")


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
