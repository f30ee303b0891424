"""Compute the ranks of log-probabilities on CPUs without compiling.

Why: the function that counts more likely tokens is compiled at the first request with log-probabilities, even with
    `--enforce-eager`. Importing and running the compiler takes 8 s on two cores, and needs g++. The compiled function
    avoids a temporary copy in GPU memory; on CPUs the model takes far longer than the copy.
How: `batched_count_greater_than` is the function before its compilation.
Upstream: not reported yet; seen with vLLM 0.32.0. Text: docs/upstream/cpu-logprob-ranks.md.
Remove when: vLLM does not compile with `--enforce-eager`.
"""

from vllm.platforms import current_platform

from yuan_grpc.vllm_check import check_vllm

TARGETS = {
    "vllm.v1.sample.ops.logprobs:batched_count_greater_than": "x, values",
    "vllm.v1.sample.sampler:batched_count_greater_than": "x, values",
}


def apply() -> None:
    """Apply the patch in this process, on CPUs only. Safe to call twice."""
    if not current_platform.is_cpu():
        return
    check_vllm(__name__, TARGETS)
    from vllm.v1.sample import sampler
    from vllm.v1.sample.ops import logprobs

    compiled = logprobs.batched_count_greater_than
    original = getattr(compiled, "_torchdynamo_orig_callable", compiled)
    logprobs.batched_count_greater_than = sampler.batched_count_greater_than = original
