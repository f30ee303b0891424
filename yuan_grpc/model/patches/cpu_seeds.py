"""Run seeded requests with long prompts on CPUs.

Why: a prompt that is computed in several steps gets a token in each step, which vLLM discards. vLLM then rewinds the
    generator of a seeded request by four offsets. A CPU generator has no offset, so the engine fails.
How: `CPUModelRunner.sample_tokens` hides the generators of unfinished prompts. Their discarded tokens are drawn from
    the generator of requests without a seed.
Upstream: not reported yet; seen with vLLM 0.32.0. Plugins for other devices have fixed copies of the same code
    (RBLN-SW/vllm-rbln#1025). Text: docs/upstream/cpu-seeds.md.
Remove when: `GPUModelRunner._bookkeeping_sync` leaves CPU generators alone.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm.platforms import current_platform

from yuan_grpc.vllm_check import check_vllm

TARGETS = {
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens": "self, ...",
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner.sample_tokens": "self, ...",
}


def apply() -> None:
    """Apply the patch in this process, on CPUs only. Safe to call twice."""
    if not current_platform.is_cpu():
        return
    check_vllm(__name__, TARGETS)
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    if CPUModelRunner.sample_tokens is GPUModelRunner.sample_tokens:
        CPUModelRunner.sample_tokens = _without_discarded_generators(GPUModelRunner.sample_tokens)


def _without_discarded_generators(sample_tokens: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(sample_tokens)
    def sample_without_discarded_generators(runner: Any, *args: Any) -> Any:
        generators = runner.input_batch.generators
        discarded = runner.discard_request_mask.np[: runner.input_batch.num_reqs].nonzero()[0]
        hidden = {index: generators.pop(index) for index in map(int, discarded) if index in generators}
        try:
            return sample_tokens(runner, *args)
        finally:
            generators.update(hidden)

    return sample_without_discarded_generators
