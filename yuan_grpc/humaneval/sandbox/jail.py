"""The jail of one program: a script that builds it, starts the program in it and ends all of it in time.

Three processes: the warder, outside, who has the clock; the first process of a new PID namespace, with whose death the
kernel kills everything in that namespace; and the program, unprivileged. All settings come as one JSON argument, and
standard input and output are the program's: its input, and the pipe of its verdict.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import resource
import select
import signal
import stat
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

NEW_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000
"""Mounts, cgroup, host name, IPC, PIDs, network."""
NEW_USERS = 0x10000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_SETATTR = 442
ATTRIBUTE_READ_ONLY, ATTRIBUTE_NOSUID = 1, 2
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SECCOMP_MODE_FILTER, SECCOMP_RET_ERRNO, SECCOMP_RET_ALLOW = 2, 0x00050000, 0x7FFF0000
LOAD, IF_EQUAL, IF_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
"""Operations of a filter."""
CALL, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16
"""Where the kernel's `struct seccomp_data` has what; of an argument the lower half, which comes first here."""
CALLS = {
    "x86_64": (0xC000003E, (41, 53), (101, 310, 311, 425)),
    "aarch64": (0xC00000B7, (198, 199), (117, 270, 271, 425)),
}
"""The kernel's number for a machine; the calls that make sockets: `socket`, `socketpair`; and those that are refused:
`ptrace`, `process_vm_readv` and `_writev`, and `io_uring_setup`, by whose rings sockets are made past any filter."""
FOREIGN_CALLS = 0x40000000
"""From here on x86-64 has those of x32."""
FAMILIES = (1, 2, 10)
"""AF_UNIX, AF_INET and AF_INET6, which a namespace of networks keeps in. AF_VSOCK, a virtual machine's, it does not."""
NOBODY = 65534
FIRST_UID = 2_000_000_000
"""Root's programs each get a user of their own above this one: the kernel counts processes by user."""
FIRST_FREE = 10
"""Descriptors below it are the program's."""
SETUP_SECONDS = 20.0
SETUP_FAILED = 125
OUT_OF_TIME = 124

Settings = dict[str, Any]


class MountAttributes(ctypes.Structure):
    """The kernel's `struct mount_attr`."""

    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def call(name: str, *arguments: object) -> int:
    """One of libc's functions; raises OSError where it fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    encoded = [
        os.fsencode(a) if isinstance(a, str) else ctypes.c_long(a) if isinstance(a, int) else a for a in arguments
    ]
    result: int = getattr(libc, name)(*encoded)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def die_with_parent(parent: int) -> None:
    """Has the kernel kill this process when its parent is gone, and leaves at once where it is gone already."""
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(SETUP_FAILED)


def enter_namespaces() -> None:
    """New namespaces for this process, of which the PIDs' begins with its next child.

    Root needs no namespace of users, and leaves its privileges otherwise; anyone else is nobody in one of their own.
    """
    user, group = os.geteuid(), os.getegid()
    call("unshare", NEW_NAMESPACES | (NEW_USERS if user else 0))
    if user:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{NOBODY} {user} 1"),
            ("gid_map", f"{NOBODY} {group} 1"),
        ):
            write(f"/proc/self/{name}", text)


def write(path: str, text: str) -> None:
    """Writes a file of the kernel's, in one piece."""
    with open(path, "w") as file:
        file.write(text)


def set_attributes(path: str, attributes: int, *, recursive: bool) -> None:
    """Restricts a mount, and those below it."""
    wanted = MountAttributes(attr_set=attributes)
    flags = AT_RECURSIVE if recursive else 0
    call("syscall", MOUNT_SETATTR, AT_FDCWD, path, flags, ctypes.byref(wanted), ctypes.sizeof(wanted))


def show(root: str, path: str, seen_at: str | None = None) -> None:
    """Shows a file or a folder in the jail, read-only, at its own path or another; a link stays a link."""
    inside = root + (seen_at or path)
    os.makedirs(os.path.dirname(inside), mode=0o755, exist_ok=True)
    if os.path.islink(path) and not seen_at:
        os.symlink(os.readlink(path), inside)
        return
    if os.path.isdir(path):
        os.makedirs(inside, mode=0o755, exist_ok=True)
    else:
        os.close(os.open(inside, os.O_CREAT | os.O_WRONLY, 0o644))
    call("mount", path, inside, None, MS_BIND | MS_REC, None)
    device = stat.S_ISCHR(os.stat(path).st_mode)
    set_attributes(inside, ATTRIBUTE_NOSUID | (0 if device else ATTRIBUTE_READ_ONLY), recursive=True)


def mount_scratch(path: str, size: int, flags: int = 0) -> None:
    """An empty file system in memory."""
    os.makedirs(path, exist_ok=True)
    options = f"size={size},nr_inodes=4096,mode=1777"
    call("mount", "tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV | flags, ctypes.c_char_p(options.encode()))


def change_root(settings: Settings) -> None:
    """A root that has what is shown and an empty /tmp, and nothing to write to but that."""
    outer = settings["mount_point"]
    root = outer + "/root"
    call("mount", "none", "/", None, MS_REC | MS_PRIVATE, None)
    call("mount", "tmpfs", outer, "tmpfs", MS_NOSUID, ctypes.c_char_p(b"size=1m,mode=755"))
    os.mkdir(root, 0o755)
    for path, seen_at in settings["shown"]:
        show(root, path, seen_at)
    for path in settings["hidden"]:
        mount_scratch(root + path, 4096, MS_RDONLY)
    mount_scratch(root + "/tmp", settings["disk"], MS_NOEXEC)
    set_attributes(outer, ATTRIBUTE_READ_ONLY, recursive=False)
    os.chdir(outer)
    call("pivot_root", ".", ".")
    call("umount2", ".", MNT_DETACH)
    # In a changed root the kernel gives nobody a namespace of users, and so no new privileges in one.
    os.chroot("root")
    os.chdir("/tmp")


def limit(settings: Settings) -> None:
    """Limits that hold for each process of the program. That on their number comes when it has been started."""
    for kind, most in (
        (resource.RLIMIT_CPU, settings["cpu"]),
        (resource.RLIMIT_AS, settings["memory"]),
        (resource.RLIMIT_FSIZE, settings["disk"]),
        (resource.RLIMIT_NOFILE, settings["files"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        _, hard = resource.getrlimit(kind)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def become_nobody(uid: int) -> None:
    """Gives up root, for good; who is not root has nothing that starting the program does not take away."""
    if os.geteuid() == 0:
        os.setgroups([])
        try:
            os.setresgid(uid, uid, uid)
        except OSError:
            uid = NOBODY  # root in a container that maps few users
            os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def filter_calls() -> None:
    """Refuses system calls that lead out of the jail past its namespaces, or into another process's memory.

    On a machine whose numbers are not known here nothing is refused.
    """
    known = CALLS.get(os.uname().machine)
    if known:
        code = b"".join(struct.pack("HBBI", *step) for step in refusals(*known))
        steps = ctypes.create_string_buffer(code)
        filtered = ctypes.create_string_buffer(struct.pack("HP", len(code) // 8, ctypes.addressof(steps)))
        call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(filtered), 0, 0)


def refusals(architecture: int, sockets: Sequence[int], refused: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """The filter's steps: an operation, how many to leap over where it holds and where it does not, and a number."""
    allow, refuse = (RETURN, 0, 0, SECCOMP_RET_ALLOW), (RETURN, 0, 0, SECCOMP_RET_ERRNO | errno.EPERM)
    steps = [(LOAD, 0, 0, ARCHITECTURE), (IF_EQUAL, 1, 0, architecture), refuse]
    steps += [(LOAD, 0, 0, CALL), (IF_AT_LEAST, 0, 1, FOREIGN_CALLS), refuse]
    for number in refused:
        steps += [(IF_EQUAL, 0, 1, number), refuse]
    for left, number in zip(reversed(range(len(sockets))), sockets, strict=True):
        steps += [(IF_EQUAL, left + 1, 0, number)]
    steps += [allow, (LOAD, 0, 0, FIRST_ARGUMENT)]
    for family in FAMILIES:
        steps += [(IF_EQUAL, 0, 1, family), allow]
    return [*steps, refuse]


def start_program(settings: Settings, started: int, uid: int) -> NoReturn:
    """Becomes the program, in a session of its own, so that no signal to its group reaches the warder."""
    os.setsid()
    if settings["isolated"]:
        become_nobody(uid)
        filter_calls()
    else:
        die_with_parent(os.getppid())
        os.chdir(settings["mount_point"])
    limit(settings)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(1, 3)
    os.dup2(started, 4)
    os.dup2(null, 1)
    messages = fcntl.fcntl(2, fcntl.F_DUPFD_CLOEXEC, FIRST_FREE)
    os.dup2(null, 2)
    try:
        os.execve(settings["command"][0], settings["command"], settings["environment"])
    finally:
        os.dup2(messages, 2)


def rule(settings: Settings, started: int, uid: int) -> int:
    """The first process inside: builds the jail, starts the program and returns its exit status, as shells have it."""
    os.setsid()
    if settings["isolated"]:
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        with contextlib.suppress(OSError):
            write("/proc/self/oom_score_adj", "1000")  # where memory runs out, the kernel ends a program first
        change_root(settings)
    else:
        die_with_parent(settings["warder"])
    child = fork(lambda: start_program(settings, started, uid))
    for descriptor in (0, 1, started):
        os.close(descriptor)
    while True:
        ended, status = os.wait()
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def fork(work: Callable[[], int]) -> int:
    """Has a child process do the work and end with what it returns. Returns the child's PID."""
    child = os.fork()
    if child == 0:
        finish(work)
    return child


def finish(work: Callable[[], int]) -> NoReturn:
    """Ends this process with what the work returns; what goes wrong is told on standard error."""
    try:
        status = work()
    except Exception as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        status = SETUP_FAILED
    os._exit(status)


def guard(settings: Settings) -> int:
    """The warder: starts all and ends it in time. Returns the program's exit status, or OUT_OF_TIME."""
    die_with_parent(settings["parent"])
    settings["warder"] = os.getpid()
    if settings["isolated"]:
        enter_namespaces()
    heard, started = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, FIRST_FREE) for end in os.pipe())
    uid = FIRST_UID + os.getpid()
    child = fork(lambda: rule(settings, started, uid))
    for descriptor in (0, 1, started, *range(3, FIRST_FREE)):
        with contextlib.suppress(OSError):
            os.close(descriptor)
    in_time = has_started(heard) and ends_within(child, settings["seconds"])
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) if in_time else OUT_OF_TIME


def has_started(heard: int) -> bool:
    """Waits for the program's first line to be reached; raises RuntimeError where it is not."""
    ready, _, _ = select.select([heard], [], [], SETUP_SECONDS)
    if not ready or not os.read(heard, 1):
        raise RuntimeError("the program could not be started")
    return True


def ends_within(child: int, seconds: float) -> bool:
    """Whether a child ends in time; it is left for its parent to wait for."""
    ready, _, _ = select.select([os.pidfd_open(child)], [], [], seconds)
    return bool(ready)


if __name__ == "__main__":
    finish(lambda: guard(json.loads(sys.argv[1])))
