"""Seccomp filter of the sandbox: the system calls that a Python program needs, and no others.

The list was measured with strace on the canonical HumanEval solutions, numpy and the standard library. It also has the
spellings of the same calls by other versions of libc. See docs/decisions/0046-system-calls.md.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass

VERDICT_FD = 3
"""Descriptor of the verdict's pipe. Programs cannot close or replace it."""
ALLOWED = (
    "read 0 63, write 1 64, pread64 17 67, pwrite64 18 68, readv 19 65, writev 20 66, lseek 8 62, open 2 -, "
    "openat 257 56, stat 4 -, lstat 6 -, fstat 5 80, newfstatat 262 79, statx 332 291, access 21 -, faccessat 269 48, "
    "readlink 89 -, readlinkat 267 78, getdents64 217 61, getcwd 79 17, chdir 80 49, mkdir 83 -, mkdirat 258 34, "
    "rmdir 84 -, unlink 87 -, unlinkat 263 35, rename 82 -, renameat 264 38, renameat2 316 276, truncate 76 45, "
    "ftruncate 77 46, fallocate 285 47, fsync 74 82, fdatasync 75 83, fadvise64 221 223, sendfile 40 71, umask 95 166, "
    "dup 32 23, pipe 22 -, pipe2 293 59, poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72, epoll_create1 291 20, "
    "epoll_ctl 233 21, epoll_wait 232 -, epoll_pwait 281 22, "
    "brk 12 214, munmap 11 215, mprotect 10 226, mremap 25 216, madvise 28 233, msync 26 227, "
    "rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136, rt_sigtimedwait 128 137, "
    "rt_sigsuspend 130 133, sigaltstack 131 132, tgkill 234 131, alarm 37 -, pause 34 -, setitimer 38 103, "
    "getitimer 36 102, restart_syscall 219 128, "
    "clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115, nanosleep 35 101, gettimeofday 96 169, "
    "time 201 -, times 100 153, getrusage 98 165, "
    "execve 59 221, exit 60 93, exit_group 231 94, wait4 61 260, futex 202 98, set_robust_list 273 99, "
    "set_tid_address 218 96, rseq 334 293, arch_prctl 158 -, sched_yield 24 124, sched_getaffinity 204 123, "
    "getcpu 309 168, getpid 39 172, getppid 110 173, gettid 186 178, getuid 102 174, geteuid 107 175, getgid 104 176, "
    "getegid 108 177, getgroups 115 158, getresuid 118 148, getresgid 120 150, getpgrp 111 -, getpgid 121 155, "
    "getsid 124 156, uname 63 160, sysinfo 99 179, getrandom 318 278"
)
"""Calls allowed with any arguments: name, number on x86-64 and number on aarch64."""
CONDITIONAL = (
    "clone 56 220, mmap 9 222, prlimit64 302 261, fcntl 72 25, ioctl 16 29, prctl 157 167, close 3 57, "
    "close_range 436 436, dup2 33 -, dup3 292 24"
)
"""Calls allowed with the arguments in CONDITIONS."""
FIRST_NEW_NUMBER = 424
"""Number from which calls are refused as unknown, so that libc uses an older one. All machines share these numbers."""

LOAD, IF_EQUAL, IF_AT_LEAST, IF_ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
"""Opcodes of the kernel's filter machine."""
NUMBER_OFFSET, ARCHITECTURE_OFFSET = 0, 4
"""Offsets in the kernel's `struct seccomp_data`."""
CLONE_THREAD = 0x10000
CLONE_NEW_NAMESPACE_OR_TRACE = 0x7E022000
MAP_HUGETLB = 0x40000
DESCRIPTOR_COMMANDS = (0, 1, 2, 3, 4, 1030)
"""F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL and F_DUPFD_CLOEXEC. Locks take memory that no limit covers."""
DEVICE_COMMANDS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX and FIOCLEX."""
NAME_COMMANDS = (15, 16, 0x53564D41)
"""PR_SET_NAME, PR_GET_NAME and PR_SET_VMA, which names memory."""

Instruction = tuple[int, int, int, int]
"""Opcode, number of instructions to skip if true, number to skip if false, operand."""
ALLOW: Instruction = (RETURN, 0, 0, 0x7FFF0000)
REFUSE: Instruction = (RETURN, 0, 0, 0x00050000 | errno.EPERM)
UNKNOWN: Instruction = (RETURN, 0, 0, 0x00050000 | errno.ENOSYS)


@dataclass(frozen=True)
class Machine:
    """A processor architecture that a filter exists for."""

    architecture: int
    """The kernel's number of the architecture."""
    column: int
    """Column of its numbers in the lists of calls."""
    keyctl: int
    """Number of the system call `keyctl`."""


MACHINES = {"x86_64": Machine(0xC000003E, 1, 250), "aarch64": Machine(0xC00000B7, 2, 219)}


def call_numbers(calls: str, machine: Machine) -> dict[str, int]:
    """Return the numbers of calls by name, without those that the machine does not have."""
    rows = (row.split() for row in calls.split(", "))
    return {row[0]: int(row[machine.column]) for row in rows if row[machine.column] != "-"}


def build_filter(machine: Machine) -> bytes:
    """Return the filter program, in the machine format of the kernel."""
    code = [(LOAD, 0, 0, ARCHITECTURE_OFFSET), (IF_EQUAL, 1, 0, machine.architecture), REFUSE]
    code += [(LOAD, 0, 0, NUMBER_OFFSET)]
    for number in call_numbers(ALLOWED, machine).values():
        code += [(IF_EQUAL, 0, 1, number), ALLOW]
    for name, number in call_numbers(CONDITIONAL, machine).items():
        condition = CONDITIONS[name]
        code += [(IF_EQUAL, 0, len(condition), number), *condition]
    code += [(IF_AT_LEAST, 0, 1, FIRST_NEW_NUMBER), UNKNOWN, REFUSE]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def _load_argument(index: int) -> Instruction:
    """Load the lower half of an argument, which comes first on these machines. The kernel ignores the upper half."""
    return (LOAD, 0, 0, 16 + 8 * index)


def _allow_values(argument: int, values: tuple[int, ...]) -> list[Instruction]:
    allowed = [instruction for value in values for instruction in ((IF_EQUAL, 0, 1, value), ALLOW)]
    return [_load_argument(argument), *allowed, REFUSE]


def _refuse_verdict_fd(argument: int) -> list[Instruction]:
    return [_load_argument(argument), (IF_EQUAL, 0, 1, VERDICT_FD), REFUSE, ALLOW]


CONDITIONS: dict[str, list[Instruction]] = {
    "clone": [
        _load_argument(0),
        (IF_ANY_BIT, 0, 1, CLONE_NEW_NAMESPACE_OR_TRACE),
        REFUSE,
        (IF_ANY_BIT, 0, 1, CLONE_THREAD),
        ALLOW,
        REFUSE,
    ],
    "mmap": [_load_argument(3), (IF_ANY_BIT, 0, 1, MAP_HUGETLB), REFUSE, ALLOW],
    "prlimit64": _allow_values(0, (0,)),
    "fcntl": _allow_values(1, DESCRIPTOR_COMMANDS),
    "ioctl": _allow_values(1, DEVICE_COMMANDS),
    "prctl": _allow_values(0, NAME_COMMANDS),
    "close": _refuse_verdict_fd(0),
    "close_range": [_load_argument(0), (IF_AT_LEAST, 0, 1, VERDICT_FD + 1), ALLOW, REFUSE],
    "dup2": _refuse_verdict_fd(1),
    "dup3": _refuse_verdict_fd(1),
}
"""By call: the instructions that allow or refuse it by its arguments."""
