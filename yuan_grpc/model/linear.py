"""Linear layers that compute several published projections in one product, and those of quantized checkpoints.

A quantized projection has scales for its own rows or blocks of rows, and a convolution has none. So for a quantized
checkpoint conv1 and v_proj are two products, and the rows of q_proj and k_proj stay in their published order.
"""

from collections.abc import Callable

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear

from yuan_grpc.model.config import YuanConfig


def has_quantized_weights(vllm_config: VllmConfig) -> bool:
    """Return whether the checkpoint itself is quantized, and not only the weights that are computed while loading."""
    return vllm_config.model_config.model_arch_config.quantization_config is not None


def input_projection(config: YuanConfig, vllm_config: VllmConfig, prefix: str) -> nn.Module:
    """Return the layer that computes LFA's first convolution and v_proj from the layer's input."""
    layer_class = SeparateInput if has_quantized_weights(vllm_config) else InputLinear
    return layer_class(config, vllm_config, prefix)


def query_key_projection(config: YuanConfig, vllm_config: VllmConfig, prefix: str) -> nn.Module:
    """Return the layer that computes all queries, then all keys, from the filtered input."""
    layer_class = PublishedQueryKeyLinear if has_quantized_weights(vllm_config) else QueryKeyLinear
    return layer_class(config, vllm_config, prefix)


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
    first_head, first_block = layer.tp_rank * local_heads, projection * layer.total_heads
    # The published rows have a block for the query and one for the key of each head.
    blocks = [
        (2 * head + half - first_block, head, half)
        for head in range(first_head, first_head + local_heads)
        for half in (0, 1)
        if 0 <= 2 * head + half - first_block < layer.total_heads
    ]
    if not blocks:  # vLLM quantizes a layer when it has all rows of its rank, and stores them in another order then
        return
    target = joined.view(2, local_heads, layer.head_dim, -1)  # (query | key), head, row, column
    source = published.view(layer.total_heads, layer.head_dim, -1)
    for block, head, half in blocks:
        target[half, head - first_head].copy_(source[block])


class SeparateInput(nn.Module):
    """The same result as `InputLinear`, from a product for the convolution and a quantized one for v_proj."""

    def __init__(self, config: YuanConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        hidden, attention, quant_config = config.hidden_size, prefix.rpartition(".")[0], vllm_config.quant_config
        self.conv1 = MergedColumnParallelLinear(
            hidden, [hidden // 2] * 2, bias=False, prefix=f"{attention}.lf_gate.conv1"
        )
        self.v_proj = ColumnParallelLinear(
            hidden, config.attention_size, bias=False, quant_config=quant_config, prefix=f"{attention}.v_proj"
        )

    def forward(self, y: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.cat([self.conv1(y)[0], self.v_proj(y)[0]], dim=-1), None


class PublishedQueryKeyLinear(MergedColumnParallelLinear):
    """The same result as `QueryKeyLinear`, from rows in their published order, which are sorted after the product.

    A rank has the rows of its heads. They are those of two halves, each from one of the projections.
    """

    def __init__(self, config: YuanConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__(
            config.hidden_size,
            [config.attention_size] * 2,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=prefix,
        )
        self.total_rows, self.head_dim = config.attention_size, config.head_dim

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        by_head, _ = super().forward(x)
        return by_head.unflatten(-1, (-1, 2, self.head_dim)).transpose(-3, -2).flatten(-3), None

    def weight_loader(self, param: nn.Parameter, loaded: torch.Tensor, projection: int) -> None:
        """Copy this rank's share of a parameter of q_proj (0) or k_proj (1)."""
        self._load(param, loaded, projection, super().weight_loader)

    def weight_loader_v2(self, param: nn.Parameter, loaded: torch.Tensor, projection: int) -> None:
        """Copy this rank's share of a parameter of q_proj (0) or k_proj (1); vLLM calls this one for most."""
        self._load(param, loaded, projection, super().weight_loader_v2)

    def _load(
        self, param: nn.Parameter, loaded: torch.Tensor, projection: int, load_shared: Callable[..., None]
    ) -> None:
        """Copy rows, packed rows or scales of rows; values for a whole projection are left to vLLM."""
        rows = self.total_rows // self.tp_size
        dim: int | None = getattr(param, "output_dim", None)
        for half in (0, 1):
            owner, first_row = divmod((2 * self.tp_rank + half) * rows, self.total_rows)
            if owner != projection:
                continue
            if dim is None:
                load_shared(param, loaded, half)
                continue
            length = param.shape[dim] // 2
            target = param.data.narrow(dim, half * length, length)
            target.copy_(loaded.narrow(dim, first_row * length // rows, length))


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
            quant_config=None if has_quantized_weights(vllm_config) else vllm_config.quant_config,
            prefix=prefix,
        )
