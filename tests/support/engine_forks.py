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
from vllm.platforms import current_platform
from vllm.utils import system_utils
from vllm.v1.engine import utils as engine_utils
from vllm.v1.executor import multiproc_executor

from yuan_grpc.server.engine.vllm import warm_fork


def fork_engines() -> None:
    """Let vLLM fork its processes from the fork server, if the engine does not run on a GPU. Safe to call twice."""
    if not current_platform.is_cpu():
        return
    multiprocessing.set_forkserver_preload(["engine_forks_preload"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the fork server of Python 3.11 ignores `sys.path`
        forkserver.ensure_running()
    use_fork_server()


def use_fork_server() -> None:
    """Replace the `multiprocessing` context of vLLM in this process."""
    for module in (system_utils, engine_utils, multiproc_executor):
        module.get_mp_context = warm_fork._Context


def keep_fork_server() -> None:
    """Let the forks of this process use the same fork server instead of starting another one."""
    server: Any = forkserver._forkserver
    server.ensure_running = resource_tracker.ensure_running
