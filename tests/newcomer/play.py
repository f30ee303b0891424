"""Plays a case against the real command."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from newcomer.cases import Case, copy_demo, port_in_use

COMMAND = (sys.executable, "-m", "yuan_grpc", "serve", "--port", "0")
PREFIX = "yuan-grpc: "
ENVIRONMENT = dict(os.environ)  # before an engine in this process sets variables
TIMEOUT_SECONDS = 240
UNAVAILABLE = ("unshare:", "mount:")
"""Start of the last line where a case cannot be played, because users may not make namespaces."""


@dataclass(frozen=True)
class Result:
    """The end of a start: its last line, its exit status, the number of lines and the time it took."""

    last_line: str
    status: int
    lines: int
    seconds: float

    @property
    def could_be_played(self) -> bool:
        """Whether the machine allows the case."""
        return not self.last_line.startswith(UNAVAILABLE)


def play(case: Case) -> Result:
    """Start a server with the mistake and return its end."""
    with TemporaryDirectory() as folder, port_in_use() as taken:
        model = copy_demo(Path(folder))
        case.spoil(model)
        arguments = [
            argument.replace("{model}", str(model)).replace("{taken}", str(taken)) for argument in case.arguments
        ]
        start = time.monotonic()
        with subprocess.Popen(
            [*case.wrapper, *COMMAND, *arguments],
            env={**ENVIRONMENT, **case.environment},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        ) as process:
            log = _read(process, case)
        lines = log.rstrip().splitlines() or [""]
        return Result(lines[-1], process.returncode, len(lines), time.monotonic() - start)


def _read(process: "subprocess.Popen[str]", case: Case) -> str:
    assert process.stderr is not None
    first = ""
    if case.stop_signal is not None:
        first = process.stderr.readline()  # of the banner, which is printed before vLLM is imported
        process.send_signal(case.stop_signal)
    try:
        return first + process.communicate(timeout=TIMEOUT_SECONDS)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        raise
