"""Start of the engine's processes as forks of one process that has imported vLLM.

Why: importing vLLM takes 8 to 26 s, and by default the server, the engine and each worker do it one after another. See
docs/decisions/0054-fork-the-engine.md and 0101-fork-the-engine-on-gpus.md.
How: before the server has any thread but that of its log, it forks a process that waits for requests to fork itself,
with the fork server of `multiprocessing`. The engine and its workers are forks of that process. It never starts a
thread or OpenMP, and never initializes CUDA.
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
from multiprocessing import forkserver, popen_spawn_posix, resource_tracker, spawn
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any, NoReturn

import torch
from vllm.platforms import current_platform
from vllm.platforms.interface import in_wsl
from vllm.utils import system_utils
from vllm.utils.platform_utils import cuda_is_initialized

from yuan_grpc.server.engine.vllm import env
from yuan_grpc.vllm_check import check_vllm

logger = logging.getLogger("vllm.yuan_grpc.server")

TARGETS = {
    "vllm.utils.system_utils:get_mp_context": "",
    "vllm.v1.engine.coordinator:get_mp_context": "",
    "vllm.v1.engine.utils:get_mp_context": "",
    "vllm.v1.executor.multiproc_executor:get_mp_context": "",
}

ENGINE = ("vllm.v1.engine.core", "yuan_grpc.model.yuan")
"""Modules of the engine that the server's own process does not need."""
CPU_WORKER = ("vllm.v1.worker.cpu_worker",)
"""The same for workers on CPUs."""
CUDA_WORKER = ("vllm.v1.worker.gpu_worker", "vllm.v1.worker.gpu.model_runner")
"""The same for workers on GPUs."""

FRONT_END = ("vllm.v1.engine.async_llm", "yuan_grpc.server.engine.vllm.engine")
"""Modules of a front end that runs in a process of its own."""

EXIT_SECONDS = 0.5
POLL_SECONDS = 0.01

_INTERPRETER = spawn.get_executable()


class _Process(ForkServerProcess):
    """A forked process with the environment of the process that started it."""

    def start(self) -> None:
        self._environment = dict(os.environ)
        super().start()

    @staticmethod
    def _Popen(process: Any) -> Any:
        """Start the process; if vLLM has replaced the interpreter by `numactl` for it, by running that."""
        if spawn.get_executable() != _INTERPRETER:
            return popen_spawn_posix.Popen(process)
        return ForkServerProcess._Popen(process)

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(self._environment)
        tempfile.tempdir = None
        system_utils.set_process_title(self.name)
        _set_threads()
        try:
            super().run()
        except Exception:  # which vLLM has logged, so that `multiprocessing` need not print it
            logger.debug("the process ends", exc_info=True)
            sys.exit(1)


class _Context(ForkServerContext):
    """The `multiprocessing` context that vLLM gets."""

    Process = _Process


def is_possible() -> bool:
    """Return whether processes of the engine can be forked: not with a CUDA context, and not from NVML's under WSL."""
    return current_platform.is_cpu() or (current_platform.is_cuda() and not (cuda_is_initialized() or in_wsl()))


def preloaded() -> tuple[str, ...]:
    """Return the modules to import before the first fork."""
    return (*ENGINE, *(CPU_WORKER if current_platform.is_cpu() else CUDA_WORKER))


def use_context() -> None:
    """Let vLLM fork the processes that this process starts, from the fork server of `multiprocessing`."""
    for target in TARGETS:
        module, _, name = target.partition(":")
        setattr(import_module(module), name, _Context)


def start(modules: Sequence[str] = ()) -> None:
    """Fork the process that the engine's processes are forked from; do nothing if they cannot be forked.

    The caller's only other thread may be that of its log, which the forks do not use.

    Args:
        modules: more modules to import before the first fork.

    Raises:
        UnsupportedVllmError: vLLM chooses the context of its processes otherwise.
    """
    if current_platform.is_cuda():
        _import(preloaded())  # here, because it is not our code that decides whether this initializes CUDA
    if not is_possible():
        return
    check_vllm(__name__, TARGETS)
    folder = tempfile.mkdtemp(prefix=env.PREFIX, dir=env.socket_parent())  # only this user can connect
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{folder}/fork")
    listener.listen()
    alive_reader, alive_writer = os.pipe()
    use_context()
    server: Any = forkserver._forkserver
    server.ensure_running = resource_tracker.ensure_running
    server._forkserver_address = f"{folder}/fork"
    if not (pid := os.fork()):
        os.close(alive_writer)
        _run(folder, listener, alive_reader, (*preloaded(), *modules))
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
        system_utils.set_process_title("ForkServer")  # forks cannot set theirs unless this process has
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
        logging.root.handlers.clear()
        _import(modules)
        gc.collect()
        gc.freeze()
        forkserver.main(listener.detach(), alive_reader, ())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)


def _import(modules: Sequence[str]) -> None:
    """Import modules that will be needed. An error is not lost: the engine imports them again and reports it."""
    for module in modules:
        with suppress(Exception):
            import_module(module)


def _set_threads() -> None:
    """Apply what OpenMP reads from the environment when a process starts: the number of threads, and their CPUs."""
    places = os.environ.get("GOMP_CPU_AFFINITY", "") or os.environ.get("OMP_PLACES", "")
    cpus = places.strip("{}").replace(",", " ").split()
    if cpus and all(cpu.isdigit() for cpu in cpus):
        os.sched_setaffinity(0, map(int, cpus))
    count = os.environ.get("OMP_NUM_THREADS", "")
    if count.isdigit() and int(count) != torch.get_num_threads():  # because setting it starts all of them at once
        torch.set_num_threads(int(count))
