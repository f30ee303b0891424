"""Attention backend for Hopper: FlashAttention for prompts, `decode_kernel` for sequences that decode."""

from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from yuan_grpc.model.hopper import is_hopper

logger = init_logger("vllm.yuan_grpc.model")

FLASH_ATTENTION_VERSION = 3
"""FlashAttention's version for Hopper."""
SUPPORTED_DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (16, 32, 64, 128)
"""Head dimensions that `decode_kernel` supports. Those of Yuan2.0-M32, 256, leave decoding to FlashAttention too."""

MIN_DECODING_HEADS = 256
"""Fewest heads of equally long sequences that decode for `decode_kernel` in a step with prompts. It does not split keys
there if the graph has room for many sequences, so one long sequence among short ones counts like fewer of them."""


def attention_backend(vllm_config: VllmConfig, head_dim: int) -> type[AttentionBackend] | None:
    """Return Yuan's backend where vLLM would choose FlashAttention 3 by default; otherwise None, so that vLLM chooses.

    `decode_kernel` supports sequences with one token in a step, so no drafts, and 16-bit keys and values without a
    sliding window. It does not support CUDA graphs shared by steps with and without prompts (`FULL`).
    """
    attention, cache = vllm_config.attention_config, vllm_config.cache_config
    is_unset = attention.backend is None and not attention.backend_per_kind
    is_plain = cache.cache_dtype == "auto" and cache.sliding_window is None and vllm_config.speculative_config is None
    is_supported = vllm_config.model_config.dtype in SUPPORTED_DTYPES and head_dim in HEAD_DIMS
    if (
        is_unset
        and is_plain
        and is_supported
        and FlashAttentionBackend.supports_block_size(cache.block_size)
        and vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.FULL
        and is_hopper()
        and get_flash_attn_version(head_size=head_dim) == FLASH_ATTENTION_VERSION
    ):
        logger.info_once("Using FlashAttention for prompts and Yuan's attention kernel for decoding")
        return YuanAttentionBackend
    return None


class YuanAttentionImpl(FlashAttentionImpl):
    """Attention for one layer."""

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
        """Write the attention to `output`, [tokens, heads, head_dim]; the cache already has the new keys and values."""
        from yuan_grpc.model.attention import decode_kernel

        decoding = None
        if attn_metadata is None or attn_metadata.max_query_len > 1:
            scales = (output_scale, output_block_scale)
            super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *scales)
            if attn_metadata is None:  # the memory-profiling run has no sequences
                return output
            decoding = attn_metadata.query_start_loc[:1]  # see `YuanAttentionMetadataBuilder.build`
        sequences = attn_metadata.block_table, attn_metadata.seq_lens
        decode_kernel.decode_attention(query, kv_cache, *sequences, output, self.scale, count=decoding)
        return output

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write new keys and values, [tokens, heads, head_dim], to the cache."""
        from yuan_grpc.model.attention import decode_kernel

        if slot_mapping.shape[0] <= decode_kernel.MAX_WRITE_TOKENS:
            decode_kernel.write_kv_cache(key, value, kv_cache, slot_mapping)
        else:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)


class YuanAttentionMetadataBuilder(FlashAttentionMetadataBuilder):
    """FlashAttention's metadata builder, without the sequences that `decode_kernel` computes."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS
    """Only with the patch `prompt_graphs`: a graph captured with prompts is not replayed for steps that only decode."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        max_sequences = max(vllm_config.scheduler_config.max_num_seqs, self.max_cudagraph_size or 0)
        self.prompt_starts = torch.zeros(max_sequences + 1, dtype=torch.int32, device=device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> FlashAttentionMetadata:
        """Return the metadata of a step.

        In a step with prompts, `query_start_loc` begins with the number of sequences that `decode_kernel` computes, and
        these have no tokens for FlashAttention. CUDA graphs read it, so it is always the same tensor.
        """
        if common_attn_metadata.max_query_len == 1:  # all are decoded: FlashAttention needs no schedule
            return super().build(common_prefix_len, common_attn_metadata, fast_build=True)
        starts = self.prompt_starts[: common_attn_metadata.num_reqs + 1]
        decoding = decoding_sequences(common_attn_metadata.query_start_loc_cpu)
        assert common_attn_metadata.seq_lens_cpu_upper_bound is not None
        lengths = common_attn_metadata.seq_lens_cpu_upper_bound[:decoding].numpy()
        if lengths.sum() * self.num_heads_q < MIN_DECODING_HEADS * lengths.max(initial=1):
            decoding = 0
        torch.clamp(common_attn_metadata.query_start_loc, min=decoding, out=starts)
        return super().build(common_prefix_len, replace(common_attn_metadata, query_start_loc=starts), fast_build)


def decoding_sequences(starts: torch.Tensor) -> int:
    """Return the number of sequences with one token before the first with another number; vLLM sorts them by it.

    Args:
        starts: [sequences + 1], on the CPU: the first row of each sequence in the batch, and the end of the last.
    """
    others = np.flatnonzero(np.diff(starts.numpy()) != 1)
    return int(others[0]) if len(others) else len(starts) - 1


class YuanAttentionBackend(FlashAttentionBackend):
    """The backend that vLLM uses, under FlashAttention's name because it differs from it in decoding only."""

    @staticmethod
    def get_impl_cls() -> type[YuanAttentionImpl]:
        """Return the implementation class."""
        return YuanAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[YuanAttentionMetadataBuilder]:
        """Return the metadata builder class."""
        return YuanAttentionMetadataBuilder
