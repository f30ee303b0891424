"""The sandbox of ordinary users, in containers that map few users, and with a keyring."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from isolation import run_in_user_namespace, skip_without_isolation

from yuan_grpc.humaneval.sandbox import jail, seccomp
from yuan_grpc.humaneval.sandbox.runner import Sandbox, SandboxError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]  # each program is three processes

ORDINARY_USER = f"1000 {os.geteuid()} 1"
ROOT_OF_ONE_USER = f"0 {os.geteuid()} 1"
ROOT_OF_A_CONTAINER = "0 0 65536"

SCORE = """
import json
from yuan_grpc.humaneval.sandbox.runner import Limits, Sandbox
with Sandbox(Limits(seconds={seconds}, memory=256 << 20), packages=()) as sandbox:
    print(json.dumps([(v.result, v.kind) for v in map(sandbox.run, {programs!r})]))
"""
NATIVE = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
"""
HOG = """
import _thread, time
lock = _thread.allocate_lock()
lock.acquire()
while True:
    try: _thread.start_new_thread(lock.acquire, ())
    except RuntimeError: time.sleep(0.1)
"""
NEIGHBOUR = """
import threading
threads = [threading.Thread(target=print) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
SCORE_NEIGHBOURS = f"""
from concurrent.futures import ThreadPoolExecutor
from yuan_grpc.humaneval.sandbox.runner import Limits, Sandbox
kinds = set()
with (
    Sandbox(Limits(seconds=2), packages=()) as short,
    Sandbox(Limits(seconds=30), packages=()) as sandbox,
    ThreadPoolExecutor() as pool,
):
    hog = pool.submit(short.run, {HOG!r})
    while not hog.done():
        kinds.add(sandbox.run({NEIGHBOUR!r}).kind)
print(*kinds, hog.result().kind, sep=", ")
"""


@pytest.fixture(autouse=True)
def isolation() -> None:
    """Skip the test where programs cannot be isolated."""
    try:
        with Sandbox(packages=()):
            pass
    except SandboxError as error:
        skip_without_isolation(error)


def replace(code: str) -> str:
    """Return a program that replaces itself with another one in a new interpreter, without the audit hook."""
    return f"import posix, sys\nposix.execv(sys.executable, [sys.executable, '-c', {code!r}])"


def score(mapping: str, *programs: str, seconds: float = 30) -> list[list[str]]:
    """Run programs in a user namespace and return their results and kinds."""
    verdicts: list[list[str]] = json.loads(
        run_in_user_namespace(mapping, SCORE.format(seconds=seconds, programs=programs))
    )
    return verdicts


def test_no_program_of_an_ordinary_user_ends_the_scoring() -> None:
    tgkill = seccomp.call_numbers(seccomp.ALLOWED, seccomp.MACHINES[os.uname().machine])["tgkill"]
    attacks = [
        "import posix\nposix.kill(1, 2)",
        "import posix\nfor pid in (1, -1, posix.getppid(), 0): posix.kill(pid, 9)",
        replace("import resource\nresource.prlimit(1, resource.RLIMIT_CPU, (9, 9))\nwhile True: pass"),
        replace("import resource\nresource.prlimit(1, resource.RLIMIT_NOFILE, (0, 0))\nwhile True: pass"),
        replace(f"{NATIVE}\nfor number in range(1, 65): libc.syscall({tgkill}, 1, 1, number)"),
    ]
    programs = [program for attack in attacks for program in (attack, "x = 1", "1 / 0")]
    verdicts = score(ORDINARY_USER, *programs)
    assert {verdict[1] for verdict in verdicts[0::3]} <= {"PermissionError", "ended without a verdict"}
    assert verdicts[1::3] == [["passed", "passed"]] * len(attacks)
    assert verdicts[2::3] == [["failed: division by zero", "ZeroDivisionError"]] * len(attacks)


def test_the_init_process_survives_all_signals_of_an_ordinary_users_program() -> None:
    """`tgkill` is on the list of allowed system calls. The program runs until its time limit."""
    tgkill = seccomp.call_numbers(seccomp.ALLOWED, seccomp.MACHINES[os.uname().machine])["tgkill"]
    signals = f"for number in range(1, 65): libc.syscall({tgkill}, 1, 1, number)"
    program = replace(f"{NATIVE}\n{signals}\nwhile True: pass")
    assert score(ORDINARY_USER, program, seconds=3) == [["timed out", "timed out"]]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can map many users")
def test_each_program_has_its_own_user_in_a_container() -> None:
    verdicts = score(ROOT_OF_A_CONTAINER, *["import posix\nraise ValueError(posix.getuid())"] * 3)
    users = {int(result.removeprefix("failed: ")) for result, _ in verdicts}
    assert len(users) == 3
    assert all(30_000 <= user < 60_000 for user in users)


@pytest.mark.parametrize(
    "mapping",
    [
        pytest.param(ORDINARY_USER, id="ordinary-user"),
        pytest.param(ROOT_OF_ONE_USER, id="root-of-one-user"),
        pytest.param(
            ROOT_OF_A_CONTAINER,
            id="root-of-a-container",
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root can map many users"),
        ),
    ],
)
def test_a_program_with_all_threads_it_may_have_leaves_its_neighbours_theirs(mapping: str) -> None:
    assert run_in_user_namespace(mapping, SCORE_NEIGHBOURS) == "passed, timed out\n"


READ_KEY = f"""{NATIVE}
key = libc.syscall({{keyctl}}, 10, -3, b'user', b'yuan-test', 0)  # KEYCTL_SEARCH in the session keyring
os._exit(key == -1)
"""
SCORE_WITH_KEY = """
import ctypes
from yuan_grpc.humaneval.sandbox.runner import Limits, Sandbox
libc = ctypes.CDLL(None, use_errno=True)
if libc.syscall({keyctl}, 1, None) == -1 or libc.syscall({add_key}, b'user', b'yuan-test', b'secret', 6, -3) == -1:
    print("no keyrings")
else:
    assert libc.syscall({keyctl}, 10, -3, b'user', b'yuan-test', 0) != -1
    with Sandbox(Limits(seconds=30), isolated=False, packages=()) as unsafe:
        print(unsafe.run({program!r}).kind)
    assert libc.syscall({keyctl}, 10, -3, b'user', b'yuan-test', 0) != -1
"""


def test_a_program_has_its_own_session_keyring() -> None:
    """Without isolation, because the filter refuses `keyctl` and hides whose keyring it is."""
    keyctl = seccomp.MACHINES[os.uname().machine].keyctl
    code = READ_KEY.format(keyctl=keyctl)
    program = (
        f"import posix, sys\nchild = posix.posix_spawn(sys.executable, [sys.executable, '-c', {code!r}], {{}})\n"
        "assert posix.waitpid(child, 0)[1] == 256, 'the key is visible'"
    )
    add_key = {"x86_64": 248, "aarch64": 217}[os.uname().machine]
    script = SCORE_WITH_KEY.format(keyctl=keyctl, add_key=add_key, program=program)
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    if output == "no keyrings\n":
        pytest.skip("this machine has no keyrings or forbids them")
    assert output == "passed\n"


def test_mapped_users_are_counted_from_zero(tmp_path: os.PathLike[str]) -> None:
    path = os.path.join(tmp_path, "uid_map")
    for text, count in (("0 1000 1\n", 1), ("0 0 65536\n", 65536), ("1000 0 1\n", 0), ("1 9 9\n0 5 1\n", 10)):
        with open(path, "w") as file:
            file.write(text)
        assert jail.count_mapped_ids(path) == count
