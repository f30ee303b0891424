"""Inspect the model's class in the process that needs the result.

Why: before the first start, and after each change of the class, vLLM imports itself in another process to find what the
    class supports, so that the import does not initialize CUDA. This takes as long as the rest of a start.
How: on CPUs, `registry._run_in_subprocess` calls the function directly.
Upstream: not reported; vLLM needs the other process for GPUs only. Text: docs/upstream/cpu-model-info.md.
Remove when: vLLM uses the other process for GPUs only.
"""

from vllm.model_executor.models import registry
from vllm.platforms import current_platform

from yuan_grpc.vllm_check import check_vllm

TARGETS = {
    "vllm.model_executor.models.registry:_run_in_subprocess": "fn",
}


def apply() -> None:
    """Apply the patch in this process, on CPUs only. Safe to call twice."""
    if current_platform.is_cpu():
        check_vllm(__name__, TARGETS)
        registry._run_in_subprocess = lambda fn: fn()
