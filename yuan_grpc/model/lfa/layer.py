"""Localized filtering-based attention (LFA): two causal convolutions of width two, before queries and keys.

    h1[t]     = A0 y[t-1]  + A1 y[t]  + a        hidden     -> hidden / 2
    h2[t]     = B0 h1[t-1] + B1 h1[t] + b        hidden / 2 -> hidden
    LFA(y)[t] = RMSNorm(h2[t] + y[t])            y and h1 are zero before a sequence's first token

One matrix product per token computes its contributions to its own sum, A1 y[t], and to the next token's, A0 y[t]. The
state that a sequence carries from step to step is therefore A0 y[t] and B0 h1[t] instead of y and h1. It is stored next
to the keys and values: see `cache_layout`.
"""

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.platforms import current_platform
from vllm.utils.torch_utils import _encode_layer_name
from vllm.v1.kv_cache_interface import FullAttentionSpec

from yuan_grpc.model.config import YuanConfig
from yuan_grpc.model.lfa import ops  # noqa: F401 - registers torch.ops.vllm.yuan_*
from yuan_grpc.model.lfa.cache_layout import StateBackend, cache_spec
from yuan_grpc.model.linear import SecondConvolution

NORM_EPS = 1e-6


class LocalizedFiltering(nn.Module, AttentionLayerBase):
    """LFA of one layer, except the product of conv1, which `InputLinear` computes together with the values.

    With tensor parallelism conv1 splits its outputs and conv2 its inputs, and h2 is summed over ranks.
    """

    def __init__(self, config: YuanConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        hidden, ranks = config.hidden_size, get_tensor_model_parallel_world_size()
        self.dims = [hidden // 2 // ranks, hidden]  # sizes of the two states
        self.conv1_bias = nn.Parameter(torch.empty(self.dims[0]), requires_grad=False)
        self.conv1_bias.weight_loader = sharded_weight_loader(0)  # type: ignore[attr-defined]
        self.conv2 = SecondConvolution(config, vllm_config, f"{prefix}.conv2")
        self.conv2_bias = nn.Parameter(torch.empty(hidden), requires_grad=False)
        self.output_layernorm = RMSNorm(hidden, eps=NORM_EPS)
        self.is_single_rank, self.is_first_rank = ranks == 1, get_tensor_model_parallel_rank() == 0
        self.is_fused = self.is_single_rank and current_platform.is_cuda()
        self.layer_name = _encode_layer_name(prefix)  # lets layers share compiled code
        self.kv_cache: list[torch.Tensor] = []
        """State of each convolution, [blocks, slots, dim]; empty until the engine has allocated its caches."""
        vllm_config.compilation_config.static_forward_context[prefix] = self

    def forward(self, contributions: torch.Tensor, y: torch.Tensor, plan: torch.Tensor) -> torch.Tensor:
        """Filter the normalized layer input.

        Args:
            contributions: [tokens, hidden / ranks]: A0 y and A1 y, concatenated.
            y: [tokens, hidden].
            plan: the step's plan from `ops.fill_plan`.

        Returns:
            [tokens, hidden].
        """
        h1 = y.new_empty(y.shape[0], self.dims[0])
        torch.ops.vllm.yuan_shift_add(contributions, self.conv1_bias, h1, plan, self.layer_name, 0)
        contributions, _ = self.conv2(h1)  # [tokens, 2 * hidden]
        z = torch.empty_like(y)
        norm = self.output_layernorm
        if self.is_fused:
            torch.ops.vllm.yuan_shift_add_norm(
                contributions, self.conv2_bias, y, norm.weight, norm.variance_epsilon, z, plan, self.layer_name, 1
            )
            return z
        bias = self.conv2_bias if self.is_first_rank else None
        torch.ops.vllm.yuan_shift_add(contributions, bias, z, plan, self.layer_name, 1)
        h2 = z if self.is_single_rank else tensor_model_parallel_all_reduce(z)
        filtered: torch.Tensor = norm(h2 + y)
        return filtered

    def get_attn_backend(self) -> type[StateBackend]:
        """Return the backend that manages the state cache."""
        return StateBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> FullAttentionSpec:
        """Return the cache specification; the two states of a slot are stored together."""
        return cache_spec(vllm_config, sum(self.dims))

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Use the cache that was allocated for `get_kv_cache_spec`, [blocks, slots, 1, sum of dims]."""
        self.kv_cache = list(torch.split(kv_cache[:, :, 0], self.dims, dim=-1))
