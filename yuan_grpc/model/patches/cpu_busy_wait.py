"""Sleep between polls of the shared-memory queue on CPUs.

Why: while vLLM's processes wait for each other they call `sched_yield` in a loop. Linux 6.18 counts that as work, so
    two waiting processes delay all others on the machine. The server's process was held up until a complete response
    had been generated.
How: `shm_broadcast.sched_yield` sleeps for 20 µs instead. GPUs keep the loop: with one GPU the engine and its worker
    are a single process; the separate workers of several GPUs were not measured.
Upstream: vllm-project/vllm#52848 and vllm-project/vllm#52814, both open; present in vLLM 0.32.0.
    Text: docs/upstream/cpu-busy-wait.md.
Remove when: vLLM sleeps between polls, or has an option for it.
"""

import time

from vllm.distributed.device_communicators import shm_broadcast
from vllm.platforms import current_platform

from yuan_grpc.vllm_check import check_vllm

TARGETS = {
    "vllm.distributed.device_communicators.shm_broadcast:sched_yield": "",
}

PAUSE_SECONDS = 20e-6


def apply() -> None:
    """Apply the patch in this process, on CPUs only. Safe to call twice."""
    if current_platform.is_cpu():
        check_vllm(__name__, TARGETS)
        shm_broadcast.sched_yield = _pause


def _pause() -> None:
    time.sleep(PAUSE_SECONDS)
