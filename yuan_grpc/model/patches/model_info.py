"""Inspect the model's class in the process that needs the result.

Why: before the first start, and after each change of the class, vLLM imports itself in another process to find what the
    class supports, so that the import does not initialize CUDA. This takes as long as the import of vLLM: 24 s on a
    host with GPUs.
How: `registry._run_in_subprocess` calls the function directly, on GPUs for classes of this package only: their import
    does not initialize CUDA.
Upstream: not reported; vLLM needs the other process for classes that initialize CUDA. Text:
    docs/upstream/model-info.md.
Remove when: vLLM uses the other process for GPUs only, and not for classes that a plugin declares safe.
"""

import inspect
from collections.abc import Callable
from typing import Any

from vllm.model_executor.models import registry
from vllm.platforms import current_platform

from yuan_grpc.vllm_check import check_vllm

TARGETS = {
    "vllm.model_executor.models.registry:_run_in_subprocess": "fn",
}

PACKAGE = "yuan_grpc."


def apply() -> None:
    """Apply the patch in this process. Safe to call twice."""
    check_vllm(__name__, TARGETS)
    in_subprocess = registry._run_in_subprocess

    def run(fn: Callable[[], Any]) -> Any:
        return fn() if current_platform.is_cpu() or _is_ours(fn) else in_subprocess(fn)

    registry._run_in_subprocess = run


def _is_ours(fn: Callable[[], Any]) -> bool:
    """Return whether the function inspects a class of this package."""
    model = inspect.getclosurevars(fn).nonlocals.get("self")
    return str(getattr(model, "module_name", "")).startswith(PACKAGE)
