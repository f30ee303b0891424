"""Apply sampling parameters to draft tokens on CPUs.

Why: for each draft token vLLM expands its request's temperature, `top_k` and `top_p`. The CPU replacement of that
    Triton kernel fills a converted copy of the output and drops it, so uninitialized memory is used in place of the
    parameters: the first request that samples ends the engine or samples from an arbitrary distribution. Also,
    `apply_top_k_only` fails in a step that has no draft tokens.
How: `cpu_triton_utils._expand_kernel_impl` is replaced by `expand`, and `apply_top_k_only` returns empty logits
    unchanged.
Upstream: vllm-project/vllm#55005, fixed by vllm-project/vllm#55006, which is open; present in vLLM 0.32.0. The failure
    of `apply_top_k_only` is not reported yet. Text: docs/upstream/cpu-spec-decode.md.
Remove when: vLLM has the fix and accepts empty logits.
"""

from collections.abc import Callable
from functools import wraps

import torch
from vllm.platforms import current_platform

from yuan_grpc.vllm_check import check_vllm

TARGETS = {
    "vllm.utils.cpu_triton_utils:_expand_kernel_impl": (
        "output, input_val, cu_num_tokens, replace_from, replace_to, MAX_NUM_TOKENS"
    ),
    "vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_only": "logits, k",
}

EXPAND_KERNEL = "_expand_kernel_impl"


def apply() -> None:
    """Apply the patch in this process, on CPUs only. Safe to call twice."""
    if not current_platform.is_cpu():
        return
    check_vllm(__name__, TARGETS)
    from vllm.utils import cpu_triton_utils
    from vllm.v1.sample.ops import topk_topp_sampler

    kernel = getattr(cpu_triton_utils, EXPAND_KERNEL)
    if not hasattr(kernel, "__wrapped__"):
        setattr(cpu_triton_utils, EXPAND_KERNEL, wraps(kernel)(expand))
        topk_topp_sampler.apply_top_k_only = _accepting_no_logits(topk_topp_sampler.apply_top_k_only)


def expand(
    output: torch.Tensor,
    request_values: torch.Tensor,
    cumulative_drafts: torch.Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int | None = None,
) -> None:
    """Write each request's value to `output`, [drafts], once for each of its draft tokens.

    Args:
        request_values: [requests].
        cumulative_drafts: [requests]: the number of draft tokens up to and including each request.
        replace_from: A value to replace.
        replace_to: Its replacement.
        MAX_NUM_TOKENS: A parameter of the Triton kernel; ignored.
    """
    drafts = torch.diff(cumulative_drafts, prepend=cumulative_drafts.new_zeros(1))
    replaced = request_values.masked_fill(request_values == replace_from, replace_to)
    output.copy_(replaced.repeat_interleave(drafts))


def _accepting_no_logits(apply_top_k_only: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @wraps(apply_top_k_only)
    def apply_unless_empty(logits: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return apply_top_k_only(logits, k) if len(logits) else logits

    return apply_unless_empty
