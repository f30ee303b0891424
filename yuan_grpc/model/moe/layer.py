"""The layer of experts that replaces the MLP in Yuan2.0-M32."""

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory

from yuan_grpc.model.config import YuanConfig
from yuan_grpc.model.moe.router import AttentionRouter


class YuanExperts(nn.Module):
    """The attention router, and vLLM's layer of experts, which selects them by these scores and runs them.

    Tensor parallelism splits the width of each expert, expert parallelism the experts. The router is replicated and is
    never quantized: a rounded score can select another expert.
    """

    def __init__(self, config: YuanConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        moe = config.moe_config
        assert moe is not None
        self.router = AttentionRouter(config.hidden_size, config.num_experts)
        self.experts = FusedMoEFactory(
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=moe["ffn_hidden_size"],
            renormalize=moe["norm_topk_prob"],
            quant_config=vllm_config.quant_config,
            router_logits_dtype=torch.float32,
            prefix=f"{prefix}.experts",
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of the selected experts, [tokens, hidden]."""
        output: torch.Tensor = self.experts(hidden_states=x, router_logits=self.router(x))
        return output
