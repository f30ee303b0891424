"""What every process of an engine needs, whichever model it runs; the plugin is the one place called in all of them."""

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import wait
from threading import Thread

import torch
from vllm.distributed.device_communicators import shm_broadcast
from vllm.platforms import current_platform

PAUSE_SECONDS = 20e-6


def prepare() -> None:
    """Asks for AMX, leaves others the CPU, and ties an engine's process to its parent and to nothing else.

    Safe to call twice.
    """
    # vLLM's bfloat16 attention on CPUs with AMX never asks Linux for the tile registers, and its worker dies of an
    # illegal instruction at the first request. Elsewhere this does nothing.
    torch.cpu._init_amx()
    if current_platform.is_cpu():
        # Waiting for each other, vLLM's processes give way in a loop (sched_yield), which Linux 6.18 takes for work: it
        # held up the server's own process until a whole answer had been generated. On GPUs one process does it all.
        shm_broadcast.sched_yield = _pause
    if parent := multiprocessing.parent_process():
        # Ctrl-C goes to a terminal's whole process group, and vLLM's workers would drop what the server lets finish.
        os.setpgid(0, 0)
        # vLLM's engine outlives a server that was killed, and keeps its memory, a GPU's too.
        Thread(target=_end_with, args=(parent.sentinel,), name="end-with-parent", daemon=True).start()


def _pause() -> None:
    time.sleep(PAUSE_SECONDS)


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
