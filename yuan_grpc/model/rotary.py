"""Rotary embeddings: vLLM's own for the plain model, and Yuan's YaRN on top of them."""

import math
from functools import lru_cache

import torch
from torch import nn
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding, get_rope

from yuan_grpc.model.config import YuanConfig

FASTEST, SLOWEST = 32, 1
"""Rotations over the original length: at more a pair keeps its frequency, at fewer the factor divides all of it."""


def rotary_embedding(config: YuanConfig, positions: int | None = None) -> nn.Module:
    """What rotates queries and keys: called with [tokens] positions and two [tokens, heads * head_dim], gives the two.

    Args:
        config: of the model.
        positions: how many the engine serves, where that is known. Only YaRN heeds it, which reaches so far that a
            table of all its positions would take 128 MiB and more.

    Returns:
        One module for all layers that ask for the same, as vLLM has it.

    Raises:
        ValueError: the kind of rotation was changed after the configuration had been read.
    """
    parameters = config.rope_parameters
    if config.use_yarn != (parameters["rope_type"] == "yarn"):
        raise ValueError("`use_yarn` must be set in config.json: an override comes after the rotation was read from it")
    if not config.use_yarn:
        return get_rope(config.head_dim, config.max_position_embeddings, is_neox_style=True, rope_parameters=parameters)
    return _shared_yarn(
        config.head_dim,
        config.max_position_embeddings if positions is None else positions,
        parameters["rope_theta"],
        parameters["factor"],
        parameters["original_max_position_embeddings"],
        torch.get_default_dtype(),
    )


def yarn_frequencies(head_dim: int, base: float, factor: float, original: int) -> torch.Tensor:
    """Radians a position of each rotated pair: [head_dim / 2], float32.

    Pairs that rotate often within the original length keep their frequency, slow ones have it divided by the factor,
    and in between it is the wavelengths that are blended. Elsewhere YaRN blends the frequencies, vLLM's included.

    Args:
        head_dim: twice the number of pairs.
        base: of the frequencies before YaRN.
        factor: by how much the original length is extended.
        original: positions the model was first trained on.
    """

    def pair_that_rotates(times: int) -> float:
        return head_dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_that_rotates(FASTEST)), 0)
    high = min(math.ceil(pair_that_rotates(SLOWEST)), head_dim - 1)
    pairs = torch.arange(head_dim // 2, dtype=torch.float32)
    frequencies = base ** (-2 * pairs / head_dim)
    kept = 1 - ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequencies / ((1 - kept) * factor + kept)


class YarnRotaryEmbedding(RotaryEmbedding):
    """vLLM's rotary embedding with a table of other cosines and sines."""

    def __init__(
        self, head_dim: int, positions: int, base: float, factor: float, original: int, dtype: torch.dtype
    ) -> None:
        self.factor = factor
        self.original = original
        super().__init__(head_dim, head_dim, positions, base, is_neox_style=True, dtype=dtype)

    def _compute_inv_freq(self, base: float) -> torch.Tensor:
        return yarn_frequencies(self.head_size, base, self.factor, self.original)

    def _compute_cos_sin_cache(self) -> torch.Tensor:
        return super()._compute_cos_sin_cache() * (0.1 * math.log(self.factor) + 1)


@lru_cache(maxsize=1)
def _shared_yarn(
    head_dim: int, positions: int, base: float, factor: float, original: int, dtype: torch.dtype
) -> YarnRotaryEmbedding:
    return YarnRotaryEmbedding(head_dim, positions, base, factor, original, dtype)
