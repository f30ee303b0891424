"""Name the signal that ended a worker while it started.

Why: a worker that is killed, for example because the memory ran out, leaves no message. The engine reports only that
    the worker failed to start, and to look for the cause in the log, which has none.
How: `WorkerProc.wait_for_ready` raises an exception that names the signal.
Upstream: not reported yet; seen with vLLM 0.32.0. Text: docs/upstream/worker-death.md.
Remove when: vLLM reports the exit status of a worker that did not start.
"""

import signal
from collections.abc import Callable
from functools import wraps
from typing import Any

from yuan_grpc.vllm_check import check_vllm

TARGETS = {
    "vllm.v1.executor.multiproc_executor:WorkerProc.wait_for_ready": "unready_proc_handles",
}

JOIN_SECONDS = 1


def apply() -> None:
    """Apply the patch in this process. Safe to call twice."""
    check_vllm(__name__, TARGETS)
    from vllm.v1.executor.multiproc_executor import WorkerProc

    if not hasattr(WorkerProc.wait_for_ready, "__wrapped__"):
        WorkerProc.wait_for_ready = staticmethod(_naming_the_signal(WorkerProc.wait_for_ready))


def _naming_the_signal(wait_for_ready: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @wraps(wait_for_ready)
    def wait(handles: Any) -> Any:
        try:
            return wait_for_ready(handles)
        except Exception as error:
            for handle in handles:
                handle.proc.join(JOIN_SECONDS)
                if (status := handle.proc.exitcode or 0) < 0:
                    raise RuntimeError(f"a worker was killed by {signal.Signals(-status).name}") from error
            raise

    return wait
