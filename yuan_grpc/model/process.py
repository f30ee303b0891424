"""What every process of an engine needs, whichever model it runs; the plugin is the one place called in all of them."""

import multiprocessing
import os
import signal
from multiprocessing.connection import wait
from threading import Thread

import torch


def prepare() -> None:
    """Asks for AMX, and ties an engine's process to the one that started it, and to nothing else."""
    # vLLM's bfloat16 attention on CPUs with AMX never asks Linux for the tile registers, and its worker dies of an
    # illegal instruction at the first request. Elsewhere this does nothing.
    torch.cpu._init_amx()
    if parent := multiprocessing.parent_process():
        # Ctrl-C goes to a terminal's whole process group, and vLLM's workers would drop what the server lets finish.
        os.setpgid(0, 0)
        # vLLM's engine outlives a server that was killed, and keeps its memory, a GPU's too.
        Thread(target=_end_with, args=(parent.sentinel,), name="end-with-parent", daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
