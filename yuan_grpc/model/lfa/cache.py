"""Where LFA's state lives: a few slots in every block of the attention cache.

A layer's filter needs two vectors of the token before: what its two convolutions made of it for the next one. Kept with
the block that the token's keys and values are in, they need no bookkeeping of their own: one block table serves both,
a full block holds the state at its end (so any prefix of whole blocks that is found in the cache can be continued), and
preemption, sharing and eviction are those of blocks. vLLM lets a sequence share a block in the very step that fills it,
which suits attention, as all keys and values are written before any is read. A state that would be read from such a
block is taken from where it is made instead: see `ops.plan`.

A block has one slot, which its last token so far owns. With speculative decoding it has two more than drafted tokens:
positions take slots in turn, so that the state before a rejected draft is still there.
"""

from dataclasses import dataclass
from fractions import Fraction

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec

SEQUENCE_START = -1
"""In a plan's first row: nothing came before this token."""
IN_BATCH = -2
"""In a plan's first row: the token before is itself of this step's batch. Its row 0 is this number, row 1 one less."""


@dataclass(frozen=True)
class Slots:
    """How many slots a block has, and how many tokens at a step's end must keep their state."""

    kept: int
    """Every token that may turn out to be the last: the sampled one and the drafts."""
    in_block: int
    """One more than kept, so that a step never writes over the state it begins with; one, where one is kept: see
    `ops.plan`."""

    @staticmethod
    def of(vllm_config: VllmConfig) -> "Slots":
        """What the engine's speculative decoding asks for."""
        drafts: int = vllm_config.num_speculative_tokens
        return Slots(kept=drafts + 1, in_block=drafts + 2 if drafts else 1)


def check_block_size(vllm_config: VllmConfig) -> None:
    """Whether a block of the attention cache has room for the slots.

    Raises:
        ValueError: it has not.
    """
    slots, block_size = Slots.of(vllm_config).in_block, vllm_config.cache_config.block_size
    if slots > block_size:
        raise ValueError(
            f"`block_size` must be at least {slots} for {slots - 2} speculative tokens, not {block_size}: "
            "a block keeps the states before them"
        )


def cache_spec(vllm_config: VllmConfig, dim: int) -> FullAttentionSpec:
    """One layer's cache, which vLLM lays out as [blocks, 1, slots, dim] in the model's dtype."""
    check_block_size(vllm_config)  # of vLLM's choosing, which it has not made when it reads its configuration
    block_size = vllm_config.cache_config.block_size
    dtype = vllm_config.model_config.dtype
    slots = Slots.of(vllm_config).in_block
    return FullAttentionSpec(
        block_size=block_size,
        num_kv_heads=1,
        head_size=dim,
        dtype=dtype,
        tokens_per_state=Fraction(block_size, slots),
        state_content_bytes=dim * dtype.itemsize,
    )


@dataclass
class StateMetadata(AttentionMetadata):
    """One step's sequences, as the scheduler laid them out."""

    query_start_loc: torch.Tensor
    """[sequences + 1]: each one's first row in the batch, and the end of the last."""
    seq_lens: torch.Tensor
    """[sequences]: tokens of each, this step's included."""
    block_table: torch.Tensor
    """[sequences, blocks]: each one's blocks in the cache."""
    block_size: int
    slots: Slots


class StateMetadataBuilder(AttentionMetadataBuilder[StateMetadata]):
    """Hands on what all layers share: nothing is computed on the CPU for a step."""

    _cudagraph_support = AttentionCGSupport.ALWAYS

    def __init__(
        self, kv_cache_spec: FullAttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.slots = Slots.of(vllm_config)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> StateMetadata:
        """The step's, by reference: a captured graph reads the same tensors at every replay."""
        return StateMetadata(
            common_attn_metadata.query_start_loc,
            common_attn_metadata.seq_lens,
            common_attn_metadata.block_table_tensor,
            self.kv_cache_spec.block_size,
            self.slots,
        )


class StateBackend(AttentionBackend):
    """What vLLM asks of the owner of a cache; the reading and writing is in `ops`."""

    @staticmethod
    def get_name() -> str:
        """Its name in vLLM's logs."""
        return "YUAN_LFA_STATE"

    @staticmethod
    def get_impl_cls() -> type:
        """There is none: it is no attention."""
        raise NotImplementedError

    @staticmethod
    def get_builder_cls() -> type[StateMetadataBuilder]:
        """Its metadata's."""
        return StateMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: FullAttentionSpec | None = None) -> list[int | MultipleOf]:
        """Whole blocks. vLLM would cut them up for an attention that takes small ones only, and slots cannot be cut."""
        return [MultipleOf(1)] if kv_cache_spec is None else [kv_cache_spec.block_size]

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """A token's state depends on its own sequence alone."""
        return True
