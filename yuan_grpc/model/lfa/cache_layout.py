"""Cache of the LFA state: a few slots in every block of the attention cache.

A layer's filter needs two vectors of the previous token: the contributions of its two convolutions to the next token.
They are stored with the block that holds the token's keys and values and need no bookkeeping of their own. One block
table serves both. A full block holds the state at its end, so any cached prefix of whole blocks can be continued.
Preemption, sharing and eviction are those of blocks. vLLM lets a sequence share a block in the step that fills it. This
suits attention, because all keys and values are written before any is read. If the block is filled in this step, the
state is read from the batch row that computes it, not from the cache: see `ops.fill_plan`.

A block has one slot, which belongs to its last token so far. With speculative decoding it has two more slots than draft
tokens: positions use the slots in turn, so that the state before a rejected draft is still available.
"""

from dataclasses import dataclass

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
"""Entry in a plan's first row: the token has no predecessor."""
IN_BATCH = -2
"""Entries in a plan's first row <= IN_BATCH: the predecessor is batch row `IN_BATCH - entry`."""

NOT_PER_TOKEN = -1
"""Tokens per state of a cache with one state per block and head, as in vLLM's `MambaSpec`."""


@dataclass(frozen=True)
class Slots:
    """Number of slots per block, and number of tokens at the end of a step whose state is kept."""

    kept_tokens: int
    """Every token that may turn out to be the last: the sampled token and the drafts."""
    per_block: int
    """One more than `kept_tokens`, so that a step never overwrites the state it begins with; with one kept token a
    single slot is enough: see `ops.fill_plan`."""

    @staticmethod
    def from_config(vllm_config: VllmConfig) -> "Slots":
        """Return the slots for the engine's speculative decoding."""
        drafts: int = vllm_config.num_speculative_tokens
        return Slots(kept_tokens=drafts + 1, per_block=drafts + 2 if drafts else 1)


def check_block_size(vllm_config: VllmConfig) -> None:
    """Check that a block of the attention cache is large enough for the slots.

    Raises:
        ValueError: the block size is too small.
    """
    slots, block_size = Slots.from_config(vllm_config).per_block, vllm_config.cache_config.block_size
    if slots > block_size:
        raise ValueError(
            f"`block_size` must be at least {slots} for {slots - 2} speculative tokens, not {block_size}: "
            "a block stores the states before them"
        )


def cache_spec(vllm_config: VllmConfig, dim: int) -> FullAttentionSpec:
    """Return the specification of one layer's cache: [blocks, slots, 1, dim] in the model's dtype.

    Slots take the place of heads, because NIXL refuses caches with a state of more than one token in this layout.
    """
    check_block_size(vllm_config)  # vLLM may choose the block size after it has verified its configuration
    block_size = vllm_config.cache_config.block_size
    dtype = vllm_config.model_config.dtype
    slots = Slots.from_config(vllm_config).per_block
    return FullAttentionSpec(
        block_size=block_size,
        num_kv_heads=1,
        head_size=dim,
        dtype=dtype,
        num_head_slots=slots,
        state_content_bytes=dim * dtype.itemsize,
        tokens_per_state=NOT_PER_TOKEN,
    )


@dataclass
class StateMetadata(AttentionMetadata):
    """The sequences of one step, in the scheduler's order."""

    query_start_loc: torch.Tensor
    """[sequences + 1]: the first row of each sequence in the batch, and the end of the last."""
    seq_lens: torch.Tensor
    """[sequences]: number of tokens of each sequence, including this step's."""
    block_table: torch.Tensor
    """[sequences, blocks]: blocks of each sequence in the cache."""
    block_size: int
    slots: Slots


class StateMetadataBuilder(AttentionMetadataBuilder[StateMetadata]):
    """Builds the metadata from what all layers share, without any computation on the CPU."""

    _cudagraph_support = AttentionCGSupport.ALWAYS

    def __init__(
        self, kv_cache_spec: FullAttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.slots = Slots.from_config(vllm_config)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> StateMetadata:
        """Return the step's metadata by reference: a captured graph reads the same tensors at every replay."""
        return StateMetadata(
            common_attn_metadata.query_start_loc,
            common_attn_metadata.seq_lens,
            common_attn_metadata.block_table_tensor,
            self.kv_cache_spec.block_size,
            self.slots,
        )


class StateBackend(AttentionBackend):
    """The backend that vLLM requires for a layer with a cache; `ops` reads and writes it."""

    @staticmethod
    def get_name() -> str:
        """Return the name in vLLM's logs."""
        return "YUAN_LFA_STATE"

    @staticmethod
    def get_impl_cls() -> type:
        """Raise NotImplementedError, because LFA is not attention."""
        raise NotImplementedError

    @staticmethod
    def get_builder_cls() -> type[StateMetadataBuilder]:
        """Return the metadata builder class."""
        return StateMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: FullAttentionSpec | None = None) -> list[int | MultipleOf]:
        """Return the whole block only, because slots cannot be split as vLLM splits blocks for other attention."""
        return [MultipleOf(1)] if kv_cache_spec is None else [kv_cache_spec.block_size]

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """Return True: a token's state depends on its own sequence only."""
        return True
