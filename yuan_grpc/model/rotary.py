"""Rotary embeddings: vLLM's for the plain model, and a YaRN variant derived from them."""

import math
from functools import lru_cache

import torch
from torch import nn
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding, get_rope

from yuan_grpc.model.config import YuanConfig

FASTEST, SLOWEST = 32, 1
"""Numbers of rotations over the original length.

A pair with more than FASTEST rotations keeps its frequency; one with fewer than SLOWEST is divided by the factor."""


def rotary_embedding(config: YuanConfig, num_positions: int | None = None) -> nn.Module:
    """Return the module that rotates queries and keys: (positions [tokens], q, k [tokens, heads * head_dim]) -> (q, k).

    Args:
        config: the model's configuration.
        num_positions: number of positions that the engine serves, if known. Only YaRN uses it, because a table of all
            positions that it extends to would take 128 MiB or more.

    Returns:
        One module that is shared by all layers with the same arguments, as in vLLM.
    """
    parameters = config.rope_parameters
    if not config.use_yarn:
        parameters = parameters | {"rope_dim": config.rotary_dim}
        return get_rope(config.head_dim, config.max_position_embeddings, is_neox_style=True, rope_parameters=parameters)
    return _shared_yarn(
        config.head_dim,
        config.max_position_embeddings if num_positions is None else num_positions,
        parameters["rope_theta"],
        parameters["factor"],
        parameters["original_max_position_embeddings"],
        torch.get_default_dtype(),
    )


def yarn_frequencies(head_dim: int, base: float, factor: float, original: int) -> torch.Tensor:
    """Return the frequency of each rotated pair in radians per position, [head_dim / 2], float32.

    Pairs that rotate often within the original length keep their frequency, and the frequency of slow pairs is divided
    by the factor. In between, Yuan blends wavelengths; other YaRN implementations, including vLLM's, blend frequencies.

    Args:
        head_dim: twice the number of pairs.
        base: base of the frequencies without YaRN.
        factor: factor by which the original length is extended.
        original: number of positions that the model was first trained on.
    """

    def pair_with_rotations(rotations: int) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_with_rotations(FASTEST)), 0)
    high = min(math.ceil(pair_with_rotations(SLOWEST)), head_dim - 1)
    pairs = torch.arange(head_dim // 2, dtype=torch.float32)
    frequencies = base ** (-2 * pairs / head_dim)
    kept = 1 - ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequencies / ((1 - kept) * factor + kept)


class YarnRotaryEmbedding(RotaryEmbedding):
    """vLLM's rotary embedding with the cosines and sines of this YaRN variant."""

    def __init__(
        self, head_dim: int, num_positions: int, base: float, factor: float, original: int, dtype: torch.dtype
    ) -> None:
        self.factor = factor
        self.original = original
        super().__init__(head_dim, head_dim, num_positions, base, is_neox_style=True, dtype=dtype)

    def _compute_inv_freq(self, base: float) -> torch.Tensor:
        return yarn_frequencies(self.head_size, base, self.factor, self.original)

    def _compute_cos_sin_cache(self) -> torch.Tensor:
        return super()._compute_cos_sin_cache() * (0.1 * math.log(self.factor) + 1)


@lru_cache(maxsize=1)
def _shared_yarn(
    head_dim: int, num_positions: int, base: float, factor: float, original: int, dtype: torch.dtype
) -> YarnRotaryEmbedding:
    return YarnRotaryEmbedding(head_dim, num_positions, base, factor, original, dtype)
