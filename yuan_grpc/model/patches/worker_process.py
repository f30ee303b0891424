"""Tie the engine's processes to the process that started them, and to nothing else.

Why: Ctrl-C in a terminal sends SIGINT to the whole process group. vLLM's workers then end at once and drop the
    requests that the server is about to finish. Conversely, the engine does not notice that its server was killed: it
    keeps running, and keeps its memory, including GPU memory.
How: each process gets its own process group, and a thread that terminates it when its parent has ended, and kills it
    a second later.
Upstream: vllm-project/vllm#55510, fixed by vllm-project/vllm#55846, which is open, for the killed server;
    vllm-project/vllm#36259, closed, for Ctrl-C. Both are present in vLLM 0.32.0. Text: docs/upstream/worker-process.md.
Remove when: vLLM's engine processes ignore a terminal's SIGINT and end with their parent.
"""

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import wait
from threading import Thread

EXIT_SECONDS = 1
"""Time to exit after SIGTERM, in seconds. vLLM's engine would wait longer for its workers, which end after it."""


def apply() -> None:
    """Apply the patch in this process if it is a child process. Safe to call twice."""
    if parent := multiprocessing.parent_process():
        os.setpgid(0, 0)
        Thread(target=_terminate_after, args=(parent.sentinel,), name="parent-monitor", daemon=True).start()


def _terminate_after(parent_sentinel: int) -> None:
    wait([parent_sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(EXIT_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
