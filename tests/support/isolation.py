"""Tests that need a machine on which the HumanEval sandbox works."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import NoReturn

import pytest

from yuan_grpc.humaneval.sandbox.runner import SandboxError


def skip_without_isolation(error: SandboxError) -> NoReturn:
    """Skip the test; fail it in CI, where the guarantees of the sandbox must be tested."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI must test the sandbox: {error}")
    pytest.skip(str(error))


ENTER_NAMESPACE = """
import os, sys
from yuan_grpc.humaneval.sandbox.jail import NEW_USER_NAMESPACE, call_libc, write_proc
mapping, script = sys.argv[1:]
entered, writer = os.pipe()
parent = os.getpid()
if os.fork() == 0:
    os.read(entered, 1)
    setgroups = "allow" if mapping == "0 0 65536" else "deny"
    for name, text in (("setgroups", setgroups), ("uid_map", mapping), ("gid_map", mapping)):
        write_proc(f"/proc/{parent}/{name}", text)
    os._exit(0)
call_libc("unshare", NEW_USER_NAMESPACE)
os.write(writer, b".")
assert os.wait()[1] == 0
os.execv(sys.executable, [sys.executable, "-c", script])
"""


def run_in_user_namespace(mapping: str, script: str) -> str:
    """Run a Python script in a user namespace and return its output.

    Args:
        mapping: first ID inside, first ID outside and number of the mapped user and group IDs.
        script: the script. It has no privileges if the first ID inside is not 0.
    """
    command = [sys.executable, "-c", ENTER_NAMESPACE, mapping, script]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert not finished.returncode, finished.stderr
    return finished.stdout
