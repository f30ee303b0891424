"""Use Yuan's LoRA layers and adapter manager.

Why: vLLM wraps a linear layer in the first of its own LoRA layers that accepts it. Those split a joined projection
    into its published parts, but the rows of q_proj and k_proj are interleaved by head, and a convolution is two parts.
    vLLM has no way to register other LoRA layers or another adapter manager.
How: `_all_lora_classes` begins with Yuan's layers, and the model runner creates a `YuanAdapterManager`.
Upstream: not requested yet; vLLM 0.32.0. Text: docs/upstream/lora-classes.md.
Remove when: vLLM lets a model register LoRA layers and an adapter manager.
"""

from yuan_grpc.vllm_check import NO_FUNCTION, check_vllm

TARGETS = {
    "vllm.lora.utils:_all_lora_classes": NO_FUNCTION,
    "vllm.v1.worker.lora_model_runner_mixin:LRUCacheWorkerLoRAManager": "vllm_config, device, embedding_modules, ...",
}


def apply() -> None:
    """Apply the patch in this process, which must serve a Yuan model only. Safe to call twice."""
    check_vllm(__name__, TARGETS)
    from vllm.lora import utils
    from vllm.v1.worker import lora_model_runner_mixin

    from yuan_grpc.model.lora import LORA_LAYERS, YuanAdapterManager

    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = YuanAdapterManager
    if LORA_LAYERS[0] not in utils._all_lora_classes:
        utils._all_lora_classes = (*LORA_LAYERS, *utils._all_lora_classes)
