"""The attention of Yuan on Hopper: FlashAttention, but for steps that only decode, which `decoding` takes."""

from typing import ClassVar

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)

from yuan_grpc.model.vllm_config import HOPPER

logger = init_logger("vllm.yuan_grpc.model")

FLASH_ATTENTION = 3
"""The version that Hopper has."""
SIXTEEN_BITS = (torch.float16, torch.bfloat16)
HEAD_DIMS = (16, 32, 64, 128)
"""That `decoding` takes."""


def attention_backend(vllm_config: VllmConfig, head_dim: int) -> type[AttentionBackend] | None:
    """Yuan's, where vLLM would take FlashAttention 3 if left to itself; or None, for vLLM to choose.

    `decoding` knows steps of one token of each sequence, so no drafts, and nothing but keys and values of 16 bits, all
    of which are attended to. CUDA graphs of steps with and without prompts alike (`FULL`) are beyond it, too.
    """
    attention, cache = vllm_config.attention_config, vllm_config.cache_config
    left_open = attention.backend is None and not attention.backend_per_kind
    plain = cache.cache_dtype == "auto" and cache.sliding_window is None and vllm_config.speculative_config is None
    suits = vllm_config.model_config.dtype in SIXTEEN_BITS and head_dim in HEAD_DIMS
    if (
        left_open
        and plain
        and suits
        and FlashAttentionBackend.supports_block_size(cache.block_size)
        and vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.FULL
        and current_platform.is_cuda()
        and current_platform.is_device_capability_family(HOPPER)
        and get_flash_attn_version(head_size=head_dim) == FLASH_ATTENTION
    ):
        logger.info_once("FlashAttention for steps with prompts, Yuan's own attention for decoding")
        return YuanAttentionBackend
    return None


class YuanAttentionImpl(FlashAttentionImpl):
    """One layer's."""

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: FlashAttentionMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Writes to `output`, [tokens, heads, head_dim], from keys and values that are in the cache already."""
        if attn_metadata is None or attn_metadata.max_query_len > 1:
            scales = (output_scale, output_block_scale)
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *scales)
        from yuan_grpc.model.attention import decode_kernel

        decode_kernel.attend(query, kv_cache, attn_metadata.block_table, attn_metadata.seq_lens, output, self.scale)
        return output

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Puts new keys and values, [tokens, heads, head_dim], into the cache."""
        from yuan_grpc.model.attention import decode_kernel

        if slot_mapping.shape[0] <= decode_kernel.MOST_KEPT:
            decode_kernel.keep(key, value, kv_cache, slot_mapping)
        else:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)


class YuanAttentionMetadataBuilder(FlashAttentionMetadataBuilder):
    """FlashAttention's, without its schedule where it is not used."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    """A graph of decoding is of no use to a step that has prompts, too."""

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> FlashAttentionMetadata:
        """A step's."""
        decodes = common_attn_metadata.max_query_len == 1
        return super().build(common_prefix_len, common_attn_metadata, fast_build or decodes)


class YuanAttentionBackend(FlashAttentionBackend):
    """What vLLM asks of an attention; under FlashAttention's name, which it is in all but decoding."""

    @staticmethod
    def get_impl_cls() -> type[YuanAttentionImpl]:
        """What computes."""
        return YuanAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[YuanAttentionMetadataBuilder]:
        """What prepares a step."""
        return YuanAttentionMetadataBuilder
