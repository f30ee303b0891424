"""Keep an empty LoRA slot for requests without an adapter on CPUs.

Why: vLLM marks a token without an adapter by slot -1. Its CPU kernels use that as an index, which selects the last
    slot, so a request without an adapter gets the weights of whichever adapter is there.
How: `worker_manager.create_lora_manager` returns a manager whose layers have one more B, which stays zero.
Upstream: vllm-project/vllm#48421, open; present in vLLM 0.32.0.
Remove when: the functions in `vllm.lora.ops.torch_ops` skip tokens whose slot is -1.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from vllm.platforms import current_platform

from yuan_grpc.vllm_check import check_vllm

TARGETS = {
    "vllm.lora.worker_manager:create_lora_manager": "model, ...",
}


def apply() -> None:
    """Apply the patch in this process, on CPUs only. Safe to call twice."""
    if not current_platform.is_cpu():
        return
    check_vllm(__name__, TARGETS)
    from vllm.lora import worker_manager

    if not hasattr(worker_manager.create_lora_manager, "__wrapped__"):
        worker_manager.create_lora_manager = _with_empty_slot(worker_manager.create_lora_manager)


def _with_empty_slot(create_lora_manager: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(create_lora_manager)
    def create_with_empty_slot(*args: Any, **kwargs: Any) -> Any:
        manager = create_lora_manager(*args, **kwargs)
        for layer in manager.modules.values():
            layer.lora_b_stacked = tuple(torch.cat([b, torch.zeros_like(b[:1])]) for b in layer.lora_b_stacked)
        return manager

    return create_with_empty_slot
