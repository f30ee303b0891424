"""Start of the engine's processes as forks of one process that has imported vLLM.

Why: importing vLLM takes 8 to 12 s of CPU time, and by default the server, the engine and each worker do it one after
another. See docs/decisions/0054-fork-the-engine.md.
How: before the server has any thread but that of its log, it forks a process that waits for requests to fork itself,
with the fork server of `multiprocessing`. The engine and its workers are forks of that process. It never starts a
thread or OpenMP. Only on CPUs: a process with a CUDA context cannot be forked, and workers on GPUs set more than OpenMP
before torch is imported.
"""

import atexit
import gc
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any, NoReturn

import torch
from vllm.platforms import current_platform
from vllm.utils import system_utils
from vllm.v1.engine import utils as engine_utils
from vllm.v1.executor import multiproc_executor

from yuan_grpc.server.engine.vllm import env
from yuan_grpc.vllm_check import check_vllm

logger = logging.getLogger("vllm.yuan_grpc.server")

TARGETS = {
    "vllm.utils.system_utils:get_mp_context": "",
    "vllm.v1.engine.utils:get_mp_context": "",
    "vllm.v1.executor.multiproc_executor:get_mp_context": "",
}

PRELOADED = ("vllm.v1.engine.core", "vllm.v1.worker.cpu_worker", "yuan_grpc.model.yuan")
"""Modules of the engine and its workers that the server's own process does not need."""

FRONT_END = ("vllm.v1.engine.async_llm", "yuan_grpc.server.engine.vllm.engine")
"""Modules of a front end that runs in a process of its own."""

EXIT_SECONDS = 0.5
POLL_SECONDS = 0.01


class _Process(ForkServerProcess):
    """A forked process with the environment of the process that started it."""

    def start(self) -> None:
        self._environment = dict(os.environ)
        super().start()

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(self._environment)
        tempfile.tempdir = None
        _set_threads()
        try:
            super().run()
        except Exception:  # which vLLM has logged, so that `multiprocessing` need not print it
            logger.debug("the process ends", exc_info=True)
            sys.exit(1)


class _Context(ForkServerContext):
    """The `multiprocessing` context that vLLM gets."""

    Process = _Process


def start(modules: Sequence[str] = ()) -> None:
    """Fork the process that the engine's processes are forked from; do nothing if the engine runs on a GPU.

    The caller's only other thread may be that of its log, which the forks do not use.

    Args:
        modules: more modules to import before the first fork.

    Raises:
        UnsupportedVllmError: vLLM chooses the context of its processes otherwise.
    """
    if not current_platform.is_cpu():
        return
    check_vllm(__name__, TARGETS)
    folder = tempfile.mkdtemp(prefix=env.PREFIX, dir=env.socket_parent())  # only this user can connect
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{folder}/fork")
    listener.listen()
    alive_reader, alive_writer = os.pipe()
    for module in (system_utils, engine_utils, multiproc_executor):
        module.get_mp_context = _Context
    server: Any = forkserver._forkserver
    server.ensure_running = resource_tracker.ensure_running
    server._forkserver_address = f"{folder}/fork"
    if not (pid := os.fork()):
        os.close(alive_writer)
        _run(folder, listener, alive_reader, (*PRELOADED, *modules))
    listener.close()
    os.close(alive_reader)
    server._forkserver_alive_fd = alive_writer
    atexit.register(_stop, pid, alive_writer, folder)


def _stop(pid: int, alive_writer: int, folder: str) -> None:
    """End the process and remove its folder. The process ends by itself unless it is still importing."""
    os.close(alive_writer)
    deadline = time.monotonic() + EXIT_SECONDS
    with suppress(ChildProcessError):  # it has ended, and another part of the program has noticed
        while not os.waitpid(pid, os.WNOHANG)[0]:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            time.sleep(POLL_SECONDS)
    shutil.rmtree(folder, ignore_errors=True)


def _run(folder: str, listener: socket.socket, alive_reader: int, modules: Sequence[str]) -> NoReturn:
    """Fork on request until the server and all forks have ended."""
    try:
        os.setpgid(0, 0)  # Ctrl-C is for the server
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
        logging.root.handlers.clear()
        for module in modules:
            import_module(module)
        gc.collect()
        gc.freeze()
        forkserver.main(listener.detach(), alive_reader, ())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)


def _set_threads() -> None:
    """Apply what OpenMP reads from the environment when a process starts: the number of threads, and their CPUs."""
    places = os.environ.get("GOMP_CPU_AFFINITY", "") or os.environ.get("OMP_PLACES", "")
    cpus = places.strip("{}").replace(",", " ").split()
    if cpus and all(cpu.isdigit() for cpu in cpus):
        os.sched_setaffinity(0, map(int, cpus))
    if (count := os.environ.get("OMP_NUM_THREADS", "")).isdigit():
        torch.set_num_threads(int(count))
