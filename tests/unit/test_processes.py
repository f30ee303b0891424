"""The end of processes that are suspended, or do not end with their parent."""

import signal
import subprocess
import sys

import psutil
import pytest

from yuan_grpc.server.engine.vllm.processes import ProcessTree

_PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "print('started', flush=True); input()"], stdin=subprocess.PIPE)
child.wait()
"""


@pytest.mark.timeout(60)
def test_a_suspended_descendant_is_killed_after_its_parent_has_ended() -> None:
    with subprocess.Popen([sys.executable, "-c", _PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"started\n"
        (child,) = psutil.Process(parent.pid).children()
        tree = ProcessTree([parent.pid])
        child.suspend()
        parent.kill()
        parent.wait()
        assert child.is_running()
        tree.kill()
        gone, alive = psutil.wait_procs([child], timeout=10)
    assert (len(gone), alive) == (1, [])


@pytest.mark.timeout(60)
def test_a_suspended_process_is_resumed() -> None:
    command, pipe = [sys.executable, "-c", "print('a', flush=True); input()"], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
            pass
        ProcessTree([process.pid]).resume()
        process.terminate()  # a suspended process would not end
        assert process.wait(timeout=10) == -signal.SIGTERM


def test_processes_that_have_ended_are_no_error() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        tree = ProcessTree([process.pid])
    tree.resume()
    tree.kill()
    ProcessTree([process.pid]).kill()
