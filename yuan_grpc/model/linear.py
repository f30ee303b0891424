"""Linear layers that compute several published projections in one product."""

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear

from yuan_grpc.model.config import YuanConfig


class InputLinear(MergedColumnParallelLinear):
    """LFA's first convolution and v_proj as one product of the layer's input.

    The result holds A0 y, a token's contribution to the next token; A1 y, its contribution to itself; and v.
    """

    def __init__(self, config: YuanConfig, vllm_config: VllmConfig, prefix: str) -> None:
        hidden = config.hidden_size
        super().__init__(
            hidden,
            [hidden // 2, hidden // 2, config.attention_size],
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=prefix,
        )


class QueryKeyLinear(MergedColumnParallelLinear):
    """q_proj and k_proj as one product that returns all queries, then all keys.

    The published model concatenates the outputs of q_proj and k_proj, splits the result into heads of twice the head
    dimension, and uses the first half of each head as its query and the second half as its key. A head's query and
    key therefore come from the same projection. Sorting the rows once, when the weights are loaded, saves two strided
    copies per layer and allows the heads to be split over ranks.
    """

    def __init__(self, config: YuanConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__(
            config.hidden_size,
            [config.attention_size] * 2,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=prefix,
        )
        self.head_dim = config.head_dim
        self.total_heads = config.num_attention_heads

    def weight_loader(self, param: nn.Parameter, loaded: torch.Tensor, projection: int) -> None:
        """Copy a published projection, [heads * head_dim, hidden], into the parameter; 0 is q_proj, 1 is k_proj."""
        place_heads(self, param.data, loaded, projection)

    weight_loader_v2 = weight_loader  # the one vLLM calls for most parameters


def place_heads(layer: QueryKeyLinear, joined: torch.Tensor, published: torch.Tensor, projection: int) -> None:
    """Copy the rows of a published projection, or of a LoRA adapter's B, to their positions on this rank.

    Args:
        layer: the layer that defines the heads and the rank.
        joined: [2 * heads * head_dim / tp, columns]; the rows of the other projection are not changed.
        published: [heads * head_dim, columns].
        projection: 0 for q_proj, 1 for k_proj.
    """
    local_heads = layer.total_heads // layer.tp_size
    first_head = layer.tp_rank * local_heads
    target = joined.view(2, local_heads, layer.head_dim, -1)  # (query | key), head, row, column
    source = published.view(layer.total_heads, layer.head_dim, -1)
    for block in range(layer.total_heads):
        head, half = divmod(projection * layer.total_heads + block, 2)
        if first_head <= head < first_head + local_heads:
            target[half, head - first_head].copy_(source[block])


class SecondConvolution(RowParallelLinear):
    """LFA's second convolution as one product: the rows of B0, then those of B1.

    Each rank holds a share of the inputs, so its result is a partial sum.
    """

    def __init__(self, config: YuanConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__(
            config.hidden_size // 2,
            2 * config.hidden_size,
            bias=False,
            reduce_results=False,  # LFA adds the two halves first, which halves the data to reduce
            quant_config=vllm_config.quant_config,
            prefix=prefix,
        )
