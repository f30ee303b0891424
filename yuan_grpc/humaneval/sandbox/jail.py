"""Script that isolates one program: it builds the jail, starts the program in it and stops it after its time limit.

Three processes take part: the supervisor, outside the jail, which keeps the time limit; the init process of a new PID
namespace, whose death makes the kernel kill every process in the namespace; and the program, unprivileged. All settings
are one JSON argument. Standard input carries the program's input, and standard output its verdict.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import resource
import select
import signal
import stat
import struct
import sys
from collections.abc import Callable
from typing import Any, NoReturn

NEW_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000
"""Flags for new mount, cgroup, UTS, IPC, PID and network namespaces."""
NEW_USER_NAMESPACE = 0x10000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
SYS_MOUNT_SETATTR = 442
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 1, 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SECCOMP_MODE_FILTER = 2
KEYCTL_JOIN_SESSION_KEYRING = 1
NOBODY = 65534
UID_RANGES = ((2_000_000_000, 1 << 22), (30_000, 30_000))
"""Ranges of user IDs (first, count) for programs started as root. The second is for containers with only 65,536 IDs.
Each program has its own ID, because the kernel counts processes by user."""
FIRST_FREE_FD = 10
"""Lowest descriptor that is not reserved for the program."""
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


def call_libc(name: str, *arguments: object) -> int:
    """Call a function of libc; raise OSError if it fails."""
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
    """Make the kernel kill this process when its parent dies; exit if the parent is dead already."""
    call_libc("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(SETUP_FAILED)


def leave_keyring(keyctl: int | None) -> None:
    """Replace the caller's session keyring with an empty one, where the kernel has keyrings and permits it."""
    if keyctl is not None:
        with contextlib.suppress(OSError):
            call_libc("syscall", keyctl, KEYCTL_JOIN_SESSION_KEYRING, None)


def choose_uid() -> int | None:
    """Return an unused user ID to which root can switch; None for other users and where root maps too few users."""
    if os.geteuid():
        return None
    mapped = min(count_mapped_ids(f"/proc/self/{name}") for name in ("uid_map", "gid_map"))
    return next((first + os.getpid() % count for first, count in UID_RANGES if first + count <= mapped), None)


def count_mapped_ids(path: str) -> int:
    """Return the end of the range of IDs that starts at 0 in a map of a user namespace."""
    with open(path) as file:
        ranges = sorted(tuple(map(int, line.split())) for line in file)
    end = 0
    for first, _, count in ranges:
        end = first + count if first == end else end
    return end


def enter_namespaces(uid: int | None) -> None:
    """Move this process to new namespaces; the PID namespace starts with its next child.

    With `uid` this needs no user namespace, because root drops its privileges later. Otherwise the user becomes
    `nobody` in a new one, whose processes the kernel counts separately.
    """
    user, group = os.geteuid(), os.getegid()
    call_libc("unshare", NEW_NAMESPACES | (NEW_USER_NAMESPACE if uid is None else 0))
    if uid is None:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{NOBODY} {user} 1"),
            ("gid_map", f"{NOBODY} {group} 1"),
        ):
            write_proc(f"/proc/self/{name}", text)


def write_proc(path: str, text: str) -> None:
    """Write a file in /proc with one system call."""
    with open(path, "w") as file:
        file.write(text)


def set_mount_attributes(path: str, attributes: int, *, recursive: bool) -> None:
    """Restrict a mount, and the mounts below it if `recursive`."""
    wanted = MountAttributes(attr_set=attributes)
    flags = AT_RECURSIVE if recursive else 0
    call_libc("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, path, flags, ctypes.byref(wanted), ctypes.sizeof(wanted))


def bind_mount(root: str, path: str, target: str | None = None) -> None:
    """Mount a file or folder read-only in the jail, at the same path or at `target`. A symbolic link is copied."""
    inside = root + (target or path)
    os.makedirs(os.path.dirname(inside), mode=0o755, exist_ok=True)
    if os.path.islink(path) and not target:
        os.symlink(os.readlink(path), inside)
        return
    if os.path.isdir(path):
        os.makedirs(inside, mode=0o755, exist_ok=True)
    else:
        os.close(os.open(inside, os.O_CREAT | os.O_WRONLY, 0o644))
    call_libc("mount", path, inside, None, MS_BIND | MS_REC, None)
    device = stat.S_ISCHR(os.stat(path).st_mode)
    set_mount_attributes(inside, MOUNT_ATTR_NOSUID | (0 if device else MOUNT_ATTR_RDONLY), recursive=True)


def mount_tmpfs(path: str, size: int, flags: int = 0) -> None:
    """Mount an empty file system in memory."""
    os.makedirs(path, exist_ok=True)
    options = f"size={size},nr_inodes=4096,mode=1777"
    call_libc("mount", "tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV | flags, ctypes.c_char_p(options.encode()))


def change_root(settings: Settings) -> None:
    """Change to a root that contains only the visible paths and an empty /tmp, the only writable folder."""
    outer = settings["mount_point"]
    root = outer + "/root"
    call_libc("mount", "none", "/", None, MS_REC | MS_PRIVATE, None)
    call_libc("mount", "tmpfs", outer, "tmpfs", MS_NOSUID, ctypes.c_char_p(b"size=1m,mode=755"))
    os.mkdir(root, 0o755)
    for path, target in settings["visible"]:
        bind_mount(root, path, target)
    for path in settings["hidden"]:
        mount_tmpfs(root + path, 4096, MS_RDONLY)
    mount_tmpfs(root + "/tmp", settings["disk"], MS_NOEXEC)
    set_mount_attributes(outer, MOUNT_ATTR_RDONLY, recursive=False)
    os.chdir(outer)
    call_libc("pivot_root", ".", ".")
    call_libc("umount2", ".", MNT_DETACH)
    # After chroot the kernel refuses new user namespaces, and with them new privileges.
    os.chroot("root")
    os.chdir("/tmp")


def set_limits(settings: Settings) -> None:
    """Set the limits of each process. The harness sets the limit on their number once the program has started."""
    for kind, limit in (
        (resource.RLIMIT_CPU, settings["cpu"]),
        (resource.RLIMIT_AS, settings["memory"]),
        (resource.RLIMIT_FSIZE, settings["disk"]),
        (resource.RLIMIT_NOFILE, settings["files"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        _, hard = resource.getrlimit(kind)
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


def drop_privileges(uid: int | None) -> None:
    """Give up root permanently. Without `uid` the user has no privileges left after execve."""
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    call_libc("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def install_seccomp_filter(code: bytes) -> None:
    """Refuse all system calls that the filter does not allow, in this process and after execve."""
    instructions = ctypes.create_string_buffer(code)
    program = ctypes.create_string_buffer(struct.pack("HP", len(code) // 8, ctypes.addressof(instructions)))
    call_libc("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0)


def start_program(settings: Settings, started_writer: int, uid: int | None) -> NoReturn:
    """Execute the program in a new session, so that a signal to its process group does not reach the supervisor."""
    os.setsid()
    if settings["isolated"]:
        drop_privileges(uid)
    else:
        die_with_parent(os.getppid())
        os.chdir(settings["mount_point"])
    set_limits(settings)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(1, 3)
    os.dup2(started_writer, 4)
    os.dup2(null, 1)
    stderr = fcntl.fcntl(2, fcntl.F_DUPFD_CLOEXEC, FIRST_FREE_FD)
    os.dup2(null, 2)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    try:
        if settings["filter"]:
            install_seccomp_filter(bytes.fromhex(settings["filter"]))
        os.execve(settings["command"][0], settings["command"], settings["environment"])
    finally:
        os.dup2(stderr, 2)


def init_process(settings: Settings, started_writer: int, uid: int | None) -> int:
    """Build the jail, start the program, wait for its end and return 0.

    The program may have the same user, so this process accepts no signals and cannot be traced.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.setsid()
    if settings["isolated"]:
        call_libc("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        with contextlib.suppress(OSError):
            write_proc("/proc/self/oom_score_adj", "1000")  # when memory runs out, the kernel kills programs first
        change_root(settings)
    else:
        die_with_parent(settings["supervisor"])
    call_libc("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    child = fork(lambda: start_program(settings, started_writer, uid))
    for descriptor in (0, 1, 2, started_writer):
        os.close(descriptor)
    while os.wait()[0] != child:
        pass
    return 0


def fork(work: Callable[[], int]) -> int:
    """Run `work` in a child process, which exits with the result, and return the child's PID."""
    child = os.fork()
    if child == 0:
        exit_with(work)
    return child


def exit_with(work: Callable[[], int]) -> NoReturn:
    """Exit this process with the result of `work`; write an exception to standard error."""
    try:
        status = work()
    except Exception as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        status = SETUP_FAILED
    os._exit(status)


def supervise(settings: Settings) -> int:
    """Start the init process, kill it at the end, and return 0 or OUT_OF_TIME."""
    die_with_parent(settings["parent"])
    settings["supervisor"] = os.getpid()
    leave_keyring(settings["keyctl"])
    uid = choose_uid()
    if settings["isolated"]:
        enter_namespaces(uid)
    started_reader, started_writer = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, FIRST_FREE_FD) for end in os.pipe())
    child = fork(lambda: init_process(settings, started_writer, uid))
    for descriptor in (0, 1, started_writer, *range(3, FIRST_FREE_FD)):
        with contextlib.suppress(OSError):
            os.close(descriptor)
    in_time = wait_for_start(started_reader) and ends_within(child, settings["seconds"])
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return 0 if in_time else OUT_OF_TIME


def wait_for_start(started_reader: int) -> bool:
    """Wait until the harness is about to run the program and return True; raise RuntimeError if that fails."""
    ready, _, _ = select.select([started_reader], [], [], SETUP_SECONDS)
    if not ready or not os.read(started_reader, 1):
        raise RuntimeError("the program could not be started")
    return True


def ends_within(child: int, seconds: float) -> bool:
    """Return whether a child process ends in time. Does not collect its status."""
    ready, _, _ = select.select([os.pidfd_open(child)], [], [], seconds)
    return bool(ready)


if __name__ == "__main__":
    exit_with(lambda: supervise(json.loads(sys.argv[1])))
