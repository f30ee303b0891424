"""Localized filtering (LFA): two causal convolutions of width two over the tokens, ahead of queries and keys.

    h1[t]     = A0 y[t-1]  + A1 y[t]  + a        hidden     -> hidden / 2
    h2[t]     = B0 h1[t-1] + B1 h1[t] + b        hidden / 2 -> hidden
    LFA(y)[t] = RMSNorm(h2[t] + y[t])            y and h1 are zero before a sequence's first token

Each sequence therefore carries two vectors a layer from step to step, beside its attention cache: y[t-1] and h1[t-1].
They live in vLLM's cache for recurrent ("Mamba") states, which gives every sequence a slot of its own, moves it on
preemption and snapshots it for prefix caching.
"""

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateCopyFunc,
    get_conv_copy_spec,
)
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from yuan_grpc.model.config import YuanConfig

NORM_EPS = 1e-6


class LocalizedFiltering(nn.Module, MambaBase):
    """LFA of one layer. Tensor parallel: conv1 splits its outputs, conv2 its inputs, so only h1's state is split.

    A convolution over (previous, current) is one matrix product over the two side by side. The checkpoint stores a
    kernel as [out, in, 2, 1], which flattened reads (channel 0 previous, channel 0 current, channel 1 previous, …):
    inputs are interleaved the same way, and any split over channels is a contiguous split of the weight.
    """

    def __init__(self, config: YuanConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        hidden, half = config.hidden_size, config.hidden_size // 2
        quant_config = vllm_config.quant_config
        self.conv1 = ColumnParallelLinear(2 * hidden, half, quant_config=quant_config, prefix=f"{prefix}.conv1")
        self.conv2 = RowParallelLinear(2 * half, hidden, quant_config=quant_config, prefix=f"{prefix}.conv2")
        self.output_layernorm = RMSNorm(hidden, eps=NORM_EPS)
        self.vllm_config = vllm_config
        self.prefix = prefix
        # Bound by the engine: ([blocks, 1, hidden], [blocks, 1, half / tp]).
        self.kv_cache: tuple[torch.Tensor, ...] = ()
        vllm_config.compilation_config.static_forward_context[prefix] = self

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """Filters the normalized layer input: [tokens, hidden] -> [tokens, hidden]."""
        h1, _ = self.conv1(self._with_previous(y, state=0))  # [tokens, half / tp]
        h2, _ = self.conv2(self._with_previous(h1, state=1))  # [tokens, hidden]
        filtered: torch.Tensor = self.output_layernorm(h2 + y)
        return filtered

    def _with_previous(self, current: torch.Tensor, state: int) -> torch.Tensor:
        """[tokens, dim] -> [tokens, 2 * dim]: each channel of the previous token beside the same of the current."""
        previous = torch.empty_like(current)
        torch.ops.vllm.yuan_shift(current, previous, self.prefix, state)
        return torch.stack((previous, current), dim=-1).flatten(1)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """The metadata this layer reads is the one vLLM prepares for its own short convolutions."""
        return MambaAttentionBackendEnum.SHORT_CONV

    def get_state_shape(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of one sequence's states on this rank: y and h1 of its last token."""
        return state_shape(self.vllm_config, get_tensor_model_parallel_world_size())

    def get_state_dtype(self) -> tuple[torch.dtype, torch.dtype]:
        """The model's own dtype, for what is kept is an activation."""
        return state_dtype(self.vllm_config)


def state_shape(vllm_config: VllmConfig, tensor_parallel_size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """((1, hidden), (1, hidden / 2 / tp)): one token of y, whole on every rank, and one of h1, split over them."""
    hidden = vllm_config.model_config.hf_config.hidden_size
    return (1, hidden), (1, hidden // 2 // tensor_parallel_size)


def state_dtype(vllm_config: VllmConfig) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of either state."""
    return vllm_config.model_config.dtype, vllm_config.model_config.dtype


def state_copy() -> tuple[MambaStateCopyFunc, MambaStateCopyFunc]:
    """How the engine snapshots the states for prefix caching: as convolution states, one token long."""
    return get_conv_copy_spec, get_conv_copy_spec
