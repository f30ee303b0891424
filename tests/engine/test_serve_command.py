"""The command `yuan-grpc serve` as a process: its start, its end, and its engine's death."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
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


class Process:
    """A server of its own, and all processes below it."""

    def __init__(self, *options: str) -> None:
        self.process = subprocess.Popen([*COMMAND, *options], stderr=subprocess.PIPE, text=True, start_new_session=True)
        assert self.process.stderr is not None
        said = ""
        while not (found := re.search(r"listening on port (\d+)", said)):
            line = self.process.stderr.readline()
            assert line, said
            said += line
        assert said.startswith("yuan-grpc ")
        self.channel = grpc.insecure_channel(f"127.0.0.1:{found[1]}")
        self.stub = yuan_pb2_grpc.YuanServiceStub(self.channel)

    def wait_until_serving(self) -> None:
        """Returns when health says so."""
        for response in health_stub(self.channel).Watch(health_pb2.HealthCheckRequest()):
            if response.status == health_pb2.HealthCheckResponse.SERVING:
                return

    def below(self) -> list[psutil.Process]:
        """The engine's processes."""
        below: list[psutil.Process] = psutil.Process(self.process.pid).children(recursive=True)
        return below

    def end(self) -> tuple[int, str]:
        """Its exit status and the rest of what it said."""
        _, said = self.process.communicate(timeout=60)
        self.channel.close()
        return self.process.returncode, said


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    """Starts a server; none outlives the test."""
    started: list[Process] = []

    def start(*options: str) -> Process:
        started.append(Process(*options))
        return started[-1]

    yield start
    for one in started:
        for process in (*one.below(), one.process) if one.process.poll() is None else ():
            process.kill()
        assert one.process.stderr is not None
        one.process.stderr.close()
        one.process.wait()


def gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=10)
    return not alive


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT])
def test_it_finishes_what_it_has_begun_and_leaves_no_process(
    start: Callable[..., Process], told: signal.Signals
) -> None:
    """Also when the whole process group is told, as by Ctrl-C in a terminal."""
    server = start()
    server.wait_until_serving()
    below = server.below()
    call = server.stub.GenerateStream(ENDLESS)
    parts = [next(call)]
    os.killpg(server.process.pid, told)
    parts += call
    assert parts[-1].usage.completion_tokens == 2000
    status, said = server.end()
    assert status == 0, said
    assert "Traceback" not in said
    assert below
    assert gone(below)


def test_when_the_engine_dies_callers_are_told_and_it_ends(start: Callable[..., Process]) -> None:
    server = start()
    server.wait_until_serving()
    below = server.below()
    for process in below:
        process.suspend()  # so that the answer cannot come before its engine goes, however slow this process is
    call = server.stub.GenerateStream(ENDLESS)
    next(call)
    for process in below:
        process.kill()
    with pytest.raises(grpc.RpcError) as raised:
        list(call)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    assert raised.value.details() == "the engine was lost while the request was running"
    status, said = server.end()
    assert status == 1
    assert "the engine was lost" in said
    assert gone(below)


def test_a_server_that_is_killed_takes_its_engine_with_it(start: Callable[..., Process]) -> None:
    server = start()
    server.wait_until_serving()
    below = server.below()
    server.process.kill()
    server.end()
    assert gone(below)


def test_who_has_the_lower_priority_number_goes_first(start: Callable[..., Process]) -> None:
    server = start("--scheduling-policy", "priority", "--max-num-seqs", "1")
    server.wait_until_serving()
    before = server.stub.GenerateStream(ENDLESS)
    next(before)
    next(before)  # it runs, so that the others wait
    came, ended = list[int](), Semaphore(0)

    def follow(priority: int, parts: Iterator[pb.GenerateStreamResponse]) -> None:
        for _ in parts:
            came.append(priority)
        ended.release()

    for priority in (5, 1):
        parts = server.stub.GenerateStream(
            pb.GenerateRequest(prompt="一", max_tokens=200, ignore_eos=True, priority=priority)
        )
        next(parts)  # it is in the queue
        Thread(target=follow, args=(priority, parts)).start()
    before.cancel()
    assert ended.acquire(timeout=60)
    assert ended.acquire(timeout=60)
    assert came.index(5) >= max(1, came.count(1) // 2)
    server.process.send_signal(signal.SIGTERM)
    assert server.end()[0] == 0


def test_it_can_be_stopped_while_the_model_loads(start: Callable[..., Process]) -> None:
    server = start()
    with pytest.raises(grpc.RpcError) as raised:
        server.stub.Generate(ENDLESS)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    while not (below := server.below()):
        assert server.process.poll() is None
    server.process.send_signal(signal.SIGTERM)
    status, said = server.end()
    assert status == 0, said
    assert gone(below)


def test_a_model_that_is_not_there_is_said_in_a_line(tmp_path: Path) -> None:
    done = subprocess.run([*COMMAND, "--model", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"yuan-grpc: {tmp_path} cannot be served: " in done.stderr


def test_an_unknown_option_is_said_in_a_line() -> None:
    done = subprocess.run([*COMMAND, "--no-such-option", "1"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.endswith("yuan-grpc serve: error: unrecognized arguments: --no-such-option 1\n")
