"""The process that compiles constraints, without an engine."""

import asyncio
import os
import sys
import time
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.engine

SERVER = Path(__file__).parent.parent / "support/constraint_server.py"


def test_a_killed_server_leaves_no_process() -> None:
    command = [sys.executable, str(SERVER), ".*" * 2000]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with Popen(command, stdout=PIPE, stderr=DEVNULL, env=environment) as server:
        assert server.stdout is not None
        process = psutil.Process(int(server.stdout.readline()))
        while not (children := process.children()):
            time.sleep(0.01)
        server.kill()
        psutil.wait_procs([process, *children])


def test_a_job_that_is_cancelled_at_once_is_never_forked() -> None:
    from yuan_grpc.server.engine.vllm.constraints.process import Server

    async def cancel() -> bool:
        unused: Any = None
        server = Server(unused, unused)
        server.receive({"id": 1, "kind": "regex", "text": "a"})
        task = server._tasks[1]
        server.receive({"cancel": 1})
        await asyncio.wait([task])
        return task.cancelled()

    assert asyncio.run(cancel())
