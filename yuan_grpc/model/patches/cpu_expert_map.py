"""Give the CPU kernel of experts the ids that they have on its rank.

Why: with expert parallelism a rank has some of the experts. vLLM passes the ids of all experts to its CPU kernel, which
    uses them as indices: it reads beyond the weights, and the worker crashes or computes with other experts.
How: `apply` maps the ids. An expert of another rank becomes the first one of this rank, with weight zero.
Upstream: not reported; vllm-project/vllm#57837 requests expert parallelism on CPUs, open; present in vLLM 0.32.0.
Remove when: `CPUUnquantizedExperts.apply` uses its argument `expert_map`.
"""

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any

import torch
from vllm.platforms import current_platform

from yuan_grpc.vllm_check import check_vllm

TARGETS = {
    "vllm.model_executor.layers.fused_moe.experts.cpu_moe:CPUUnquantizedExperts.apply": (
        "self, output, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts, expert_map, ..."
    ),
}


def apply() -> None:
    """Apply the patch in this process, on CPUs only. Safe to call twice."""
    if not current_platform.is_cpu():
        return
    check_vllm(__name__, TARGETS)
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    if not hasattr(CPUUnquantizedExperts.apply, "__wrapped__"):
        CPUUnquantizedExperts.apply = _with_local_ids(CPUUnquantizedExperts.apply)


def _with_local_ids(run: Callable[..., None]) -> Callable[..., None]:
    parameters = signature(run)

    @wraps(run)
    def run_local(*args: Any, **kwargs: Any) -> None:
        call = parameters.bind(*args, **kwargs)
        if (expert_map := call.arguments["expert_map"]) is not None:
            ids, weights = local_experts(call.arguments["topk_ids"], call.arguments["topk_weights"], expert_map)
            call.arguments |= {"topk_ids": ids, "topk_weights": weights}
        run(*call.args, **call.kwargs)

    return run_local


def local_experts(
    ids: torch.Tensor, weights: torch.Tensor, expert_map: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids on this rank and the weights of a token's experts, each [tokens, experts of a token].

    Args:
        ids: ids among all experts.
        weights: the experts' shares of the result.
        expert_map: [experts]: the id on this rank, or -1.
    """
    local = expert_map[ids.long()]
    return local.clamp(min=0).to(ids.dtype), torch.where(local < 0, 0, weights)
