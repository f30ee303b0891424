"""Drafts of requests that draw their tokens, on CPUs: mends of what vLLM's rejection sampler is given there.

vLLM 0.32.0 gives each draft its request's temperature, `top_k` and `top_p` through a stand-in for a Triton kernel that
fills a copy and drops it: what was in the memory before is used in their place, and the first request that draws ends
the engine or draws from anything (vllm-project/vllm#55005).
"""

from collections.abc import Callable
from functools import wraps

import torch
from vllm.platforms import current_platform

EXPAND = "_expand_kernel_impl"


def mend() -> None:
    """Has vLLM give each draft what its request asked for. Safe to call twice, and nothing to GPUs."""
    if not current_platform.is_cpu():
        return
    from vllm.utils import cpu_triton_utils as stand_ins
    from vllm.v1.sample.ops import topk_topp_sampler as cutting

    if not hasattr(getattr(stand_ins, EXPAND), "__wrapped__"):
        setattr(stand_ins, EXPAND, wraps(getattr(stand_ins, EXPAND))(expand))
        cutting.apply_top_k_only = _of_any_draft(cutting.apply_top_k_only)


def expand(
    output: torch.Tensor,
    of_request: torch.Tensor,
    ends: torch.Tensor,
    replaced: float,
    by: float,
    MAX_NUM_TOKENS: int | None = None,
) -> None:
    """Writes to `output`, [drafts], each request's value once for each of its drafts.

    Args:
        of_request: [requests].
        ends: [requests]: how many drafts there are up to each request's last.
        replaced: a value that is written as another,
        by: this one.
        MAX_NUM_TOKENS: the kernel's; of no account.
    """
    drafts = torch.diff(ends, prepend=ends.new_zeros(1))
    output.copy_(of_request.masked_fill(of_request == replaced, by).repeat_interleave(drafts))


def _of_any_draft(cut: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`top_k` alone is cut by the largest of a step's, which fails where a step has no draft."""

    @wraps(cut)
    def cut_any(logits: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return cut(logits, k) if len(logits) else logits

    return cut_any
