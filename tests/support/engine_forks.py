"""Start of the engine processes of a test session as forks of one process that has imported vLLM.

The serve command forks that process from itself, in `yuan_grpc.server.engine.vllm.warm_fork`. The process of the tests
has threads, so here the fork server of `multiprocessing` is a new interpreter, prepared by `engine_forks_preload`.
"""

import multiprocessing
import os
import sys
from multiprocessing import forkserver, resource_tracker
from typing import Any

import pytest

from yuan_grpc.server.engine.vllm import warm_fork


def fork_engines() -> None:
    """Let vLLM fork its processes from the fork server, if it can. Safe to call twice."""
    if not warm_fork.is_possible():
        return
    multiprocessing.set_forkserver_preload(["engine_forks_preload"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the fork server of Python 3.11 ignores `sys.path`
        forkserver.ensure_running()
    warm_fork.use_context()


def keep_fork_server() -> None:
    """Let the forks of this process use the same fork server instead of starting another one."""
    server: Any = forkserver._forkserver
    server.ensure_running = resource_tracker.ensure_running
