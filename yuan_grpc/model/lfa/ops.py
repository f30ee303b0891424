"""Custom operations that add the previous token's contribution, from a convolution, to each token.

The batch of a step is a sequence of rows: one token for each decoding sequence, chunks of prompts, then padding. Once
per step `fill_plan` finds out where each row's predecessor is and which states must be kept; `shift_add` follows the
plan in every layer. Both are opaque to torch.compile. Only `fill_plan` reads data that changes from step to step, so
CUDA graphs of parts of a step are split there. Each has a Triton kernel (see `kernels`) and, for devices without
Triton, a PyTorch version here.
"""

from typing import Protocol, cast

import torch
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import LayerNameType, _resolve_layer_name, direct_register_custom_op

from yuan_grpc.model.lfa.cache_layout import IN_BATCH, SEQUENCE_START, StateMetadata

PLAN_OP = "vllm::yuan_plan"


class StatefulLayer(Protocol):
    """The part of an LFA layer that the operations use."""

    kv_cache: list[torch.Tensor]
    """[blocks, slots, dim] for each convolution; empty until the engine has allocated its caches."""


def new_plan(tokens: torch.Tensor) -> torch.Tensor:
    """Return an uninitialized plan for these tokens, [3, tokens] int32: read slot, write slot, source row."""
    return torch.empty((3, tokens.shape[0]), dtype=torch.int32, device=tokens.device)


def fill_plan(plan: torch.Tensor, layer_name: LayerNameType) -> None:
    """Write, for each row of this step's batch, where its predecessor's state is and which state it stores.

    Args:
        plan: [3, tokens], overwritten; see the table.
        layer_name: any layer with LFA, because all of them have the same sequences.

    | row of `plan` | value | meaning |
    | --- | --- | --- |
    | 0: read slot | slot >= 0 | the predecessor's state is in this slot |
    | | `SEQUENCE_START` | there is no predecessor |
    | | `IN_BATCH - r` | the predecessor is batch row r: the row before, or one that computes a shared block |
    | 1: write slot | slot >= 0 | a state is stored in this slot |
    | | -1 | nothing is stored |
    | 2: source row | r | the stored state is that of batch row r |

    A row that stores a state stores its own, with one exception. A sequence's first row reads the slot that the
    sequence starts from, and a later row may reuse this slot. The first row then stores the later row's state, once it
    has read the slot.
    """
    # A decorator would check only once and too early: vLLM may enable breaks while it reads its configuration.
    eager_break_during_capture(_fill_plan)(plan, _resolve_layer_name(layer_name))


def _fill_plan(plan: torch.Tensor, layer_name: str) -> None:
    metadata = get_forward_context().attn_metadata
    if metadata is None:  # the memory-profiling run has no sequences
        plan.fill_(SEQUENCE_START)
        return
    assert isinstance(metadata, dict)
    step = cast(StateMetadata, metadata[layer_name])
    if plan.is_cuda:
        from yuan_grpc.model.lfa import kernels

        kernels.fill_plan(plan, step)
    else:
        fill_plan_in_torch(plan, step)


def fill_plan_in_torch(plan: torch.Tensor, step: StateMetadata) -> None:
    """Compute `fill_plan` without Triton."""
    read, write, source = plan.long().unbind()
    starts, block_size, slots = step.query_start_loc.long(), step.block_size, step.slots
    rows = torch.arange(plan.shape[1], device=plan.device)
    sequence = torch.searchsorted(starts[:-1], rows, right=True) - 1
    first, last = starts[sequence], starts[sequence + 1] - 1
    position = step.seq_lens.long()[sequence] - 1 - last + rows
    is_token = (rows <= last) & (position >= 0)  # the other rows are padding
    position.clamp_(min=0)

    def slot_of(position: torch.Tensor) -> torch.Tensor:
        block = step.block_table[sequence, (position // block_size).clamp(min=0)].long()
        return block * slots.per_block + position % block_size % slots.per_block

    last_computed = position - (rows - first) - 1  # the sequence's last position before this step
    has_computed = position > rows - first
    start_slot, own_slot = slot_of(last_computed), slot_of(position)
    is_kept = is_token & ((position % block_size == block_size - 1) | (last - rows < slots.kept_tokens))
    is_delegated = is_kept & has_computed & (own_slot == start_slot)  # written by the sequence's first row
    source.copy_(rows).index_copy_(0, first[is_delegated], rows[is_delegated])
    write.copy_(torch.where(is_kept & ~is_delegated, own_slot, -1))
    write.index_copy_(0, first[is_delegated], own_slot[is_delegated])
    torch.sub(IN_BATCH + 1, rows, out=read)  # the row before
    is_first = rows == first
    read[is_first & has_computed] = start_slot[is_first & has_computed]
    read[(is_first & ~has_computed) | ~is_token] = SEQUENCE_START
    (after_block,) = torch.where(is_first & has_computed & is_token & (position % block_size == 0))
    if len(after_block):  # only these rows may follow a shared block
        computing = _computing_rows(step, sequence[after_block], last_computed[after_block])
        read[after_block] = torch.where(computing >= 0, IN_BATCH - computing, read[after_block])
    plan.copy_(torch.stack((read, write, source)))


def _computing_rows(step: StateMetadata, sequence: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Return the rows of this step that compute these positions in blocks shared with other sequences, or -1.

    A shared block is part of a shared prefix, so it is at the same index in both block tables.
    """
    starts, ends, block = step.query_start_loc.long(), step.seq_lens.long(), position // step.block_size
    row = starts[1:] - ends + position[:, None]  # [positions, sequences]: the row, if the sequence computes it here
    is_computed = (row >= starts[:-1]) & (row < starts[1:])
    table = step.block_table[: len(ends)]
    is_shared = table[sequence, block][:, None] == table[:, block].T
    return torch.where(is_computed & is_shared, row, -1).amax(dim=1)


def shift_add(
    contributions: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    plan: torch.Tensor,
    layer_name: LayerNameType,
    conv: int,
) -> None:
    """Write the sum of each token's own and its predecessor's contribution to `out`, and store states.

    Args:
        contributions: [tokens, 2 * dim]: each token's contribution to the next token, then its contribution to itself.
        bias: [dim], or None.
        out: [tokens, dim], overwritten; summed in float32 and rounded once.
        plan: the step's plan, from `fill_plan`.
        layer_name: the layer whose cache holds the state.
        conv: the layer's convolution, 0 or 1.
    """
    cache = _cache(layer_name, conv)
    if contributions.is_cuda:
        from yuan_grpc.model.lfa import kernels

        kernels.shift_add(contributions, bias, out, plan, cache)
    else:
        shift_add_in_torch(contributions, bias, out, plan, cache)


def shift_add_in_torch(
    contributions: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    plan: torch.Tensor,
    cache: torch.Tensor | None,
) -> None:
    """Compute `shift_add` without Triton; `cache` is [blocks, slots, dim] or None."""
    to_next, to_self = contributions.float().chunk(2, dim=-1)
    read, write, source = plan.long().unbind()
    total = torch.zeros_like(to_self)
    (in_batch,) = torch.where(read <= IN_BATCH)
    total[in_batch] = to_next[IN_BATCH - read[in_batch]]
    if cache is not None:
        (cached,) = torch.where(read >= 0)
        total[cached] = cache[_indices(read[cached], cache)].float()
        (kept,) = torch.where(write >= 0)
        cache[_indices(write[kept], cache)] = to_next[source[kept]].to(cache.dtype)
    total += to_self
    if bias is not None:
        total += bias.float()
    out.copy_(total)


def _indices(slots: torch.Tensor, cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return blocks and the slots in them; the cache cannot be flattened, because it is a strided view."""
    return slots // cache.shape[1], slots % cache.shape[1]


def shift_add_norm(
    contributions: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    out: torch.Tensor,
    plan: torch.Tensor,
    layer_name: LayerNameType,
    conv: int,
) -> None:
    """Compute `shift_add`, add a residual and apply an RMS norm: [tokens, dim] in one kernel, on GPUs.

    Args:
        residual: [tokens, dim].
        weight: [dim], the norm's weight.
        epsilon: the norm's epsilon.
    """
    from yuan_grpc.model.lfa import kernels

    cache = _cache(layer_name, conv)
    kernels.shift_add(contributions, bias, out, plan, cache, norm=kernels.Norm(residual, weight, epsilon))


def _cache(layer_name: LayerNameType, conv: int) -> torch.Tensor | None:
    """Return the cache of a layer's state, [blocks, slots, dim]; None while vLLM measures the memory for caches."""
    layer = cast(StatefulLayer, get_forward_context().no_compile_layers[_resolve_layer_name(layer_name)])
    return layer.kv_cache[conv] if layer.kv_cache else None


def _fake_inplace_op(*_: object, **__: object) -> None:
    """Do nothing: torch.compile traces this for an operation that only overwrites its arguments."""


direct_register_custom_op("yuan_plan", fill_plan, mutates_args=["plan"], fake_impl=_fake_inplace_op)
direct_register_custom_op("yuan_shift_add", shift_add, mutates_args=["out"], fake_impl=_fake_inplace_op)
direct_register_custom_op("yuan_shift_add_norm", shift_add_norm, mutates_args=["out"], fake_impl=_fake_inplace_op)
