"""A `yuan-grpc serve` process with a real engine."""

import re
import subprocess
import sys
from queue import SimpleQueue
from threading import Thread
from typing import IO, ClassVar

import grpc
import psutil
from grpc_health.v1 import health_pb2
from health_client import health_stub
from one_thread import default_environment

from yuan_grpc.server.engine.vllm.processes import ProcessTree
from yuan_grpc.v1 import yuan_pb2_grpc

COMMAND = (sys.executable, "-m", "yuan_grpc", "serve", "--port", "0")
ENVIRONMENT = default_environment()  # before an engine in this process sets variables


class ServerProcess:
    """A `yuan-grpc serve` process. The report of a failed test has the log of the newest one."""

    newest_log: ClassVar[list[str]] = []
    """The lines that the newest server has logged so far."""

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
        self._lines: SimpleQueue[str] = SimpleQueue()
        self._reader = Thread(target=self._read_log, args=(self.process.stderr,), daemon=True)
        self._reader.start()
        log = ""
        while not (found := re.search(r"gRPC listening on port (\d+)", log)):
            line = self._lines.get()
            assert line, log
            log += line
        assert log.startswith(("yuan-grpc ", "{"))
        self.start_log = log
        self.address = f"127.0.0.1:{found[1]}"
        self.channel = grpc.insecure_channel(self.address)
        self.stub = yuan_pb2_grpc.YuanServiceStub(self.channel)

    def _read_log(self, stderr: IO[str]) -> None:
        ServerProcess.newest_log = lines = []
        with stderr:
            for line in stderr:
                lines.append(line)
                self._lines.put(line)
        self._lines.put("")

    def wait_until_serving(self) -> None:
        """Return when health is SERVING."""
        self.wait_for(health_pb2.HealthCheckResponse.SERVING)

    def wait_for(self, status: int) -> None:
        """Return when health has a status."""
        for response in health_stub(self.channel).Watch(health_pb2.HealthCheckRequest()):
            if response.status == status:
                return

    def engine_processes(self) -> list[psutil.Process]:
        """Return the processes of the engine."""
        children: list[psutil.Process] = psutil.Process(self.process.pid).children(recursive=True)
        return children

    def wait_for_exit(self) -> tuple[int, str]:
        """Return the exit status and the remaining log."""
        status = self.process.wait(timeout=60)
        self._reader.join(timeout=60)
        assert not self._reader.is_alive(), "a process of the server is still running"
        self.channel.close()
        return status, "".join(iter(self._lines.get, ""))

    def kill(self) -> None:
        """Kill all processes, if the server is running."""
        if self.process.poll() is None:
            ProcessTree([self.process.pid]).kill()
        self.process.wait()
        self.channel.close()
