"""Triton kernels for `ops`; the same kernels serve prompts, decoding and mixed batches on GPUs."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from yuan_grpc.model.lfa.cache_layout import IN_BATCH, SEQUENCE_START, StateMetadata
from yuan_grpc.model.pdl import pdl_options, wait_for_previous_kernel

ROWS = 128
"""Rows of the batch per program of `fill_plan`."""

SEARCHED_SEQUENCES = 128
"""Sequences per iteration of the search for the one that computes a shared block."""


@triton.jit
def _slot(
    block_table: tl.tensor,
    sequence: tl.tensor,
    position: tl.tensor,
    table_stride: tl.tensor,
    block_size: tl.tensor,
    slots: tl.tensor,
    mask: tl.tensor,
) -> tl.tensor:
    """Return the slot of a position: positions use the slots of their block in turn."""
    block = tl.load(block_table + sequence * table_stride + position // block_size, mask=mask, other=0)
    return block * slots + position % block_size % slots


@triton.jit(do_not_specialize=["rows", "sequences", "search_steps"])  # each value would compile a kernel
def _plan_kernel(
    plan: tl.tensor,
    query_start_loc: tl.tensor,
    seq_lens: tl.tensor,
    block_table: tl.tensor,
    rows: tl.tensor,
    sequences: tl.tensor,
    table_stride: tl.tensor,
    block_size: tl.tensor,
    slots: tl.tensor,
    kept_tokens: tl.tensor,
    search_steps: tl.tensor,  # 2 ** search_steps > sequences
    ROWS: tl.constexpr,
    SEQUENCE_START: tl.constexpr,
    IN_BATCH: tl.constexpr,
) -> None:
    """Write the plan of ROWS rows. `_shared_blocks_kernel` then corrects predecessors in blocks of this step."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_plan = row < rows
    # Find the last sequence that starts at or before the row: a sequence without rows starts where the next one does.
    low = tl.zeros([ROWS], tl.int32)
    high = tl.zeros([ROWS], tl.int32) + sequences
    for _ in range(search_steps):
        middle = (low + high) // 2
        is_searching = low < high
        is_upper = is_searching & (tl.load(query_start_loc + middle) <= row)
        low = tl.where(is_upper, middle + 1, low)
        high = tl.where(is_searching & ~is_upper, middle, high)
    sequence = tl.maximum(low - 1, 0)
    first = tl.load(query_start_loc + sequence)
    last = tl.load(query_start_loc + sequence + 1) - 1
    position = tl.load(seq_lens + sequence) - 1 - last + row
    is_token = in_plan & (row <= last) & (position >= 0)
    position = tl.maximum(position, 0)
    has_computed = is_token & (position > row - first)
    last_computed = tl.maximum(position - (row - first) - 1, 0)  # the sequence's last position before this step
    start_slot = _slot(block_table, sequence, last_computed, table_stride, block_size, slots, has_computed)
    own_slot = _slot(block_table, sequence, position, table_stride, block_size, slots, is_token)
    is_block_end = position % block_size == block_size - 1
    is_kept = is_token & (is_block_end | (last - row < kept_tokens))
    is_delegated = is_kept & has_computed & (own_slot == start_slot)
    # A later row may reuse the slot that the sequence starts from. The first row reads the slot, then stores that row's
    # state. Find the later row.
    end_in_block = position + (last - row) - last_computed // block_size * block_size  # relative to the first block
    end_in_block = tl.minimum(end_in_block, block_size - 1)
    start_in_block = last_computed % block_size
    source_in_block = start_in_block + (end_in_block - start_in_block) // slots * slots
    source_row = first + source_in_block - start_in_block - 1
    writes_start_slot = has_computed & (row == first) & (source_in_block > start_in_block)
    is_source_kept = (source_in_block == block_size - 1) | (last - source_row < kept_tokens)
    writes_start_slot = writes_start_slot & is_source_kept
    read = tl.where(row == first, tl.where(has_computed, start_slot, SEQUENCE_START), IN_BATCH + 1 - row)
    write = tl.where(writes_start_slot, start_slot, tl.where(is_kept & ~is_delegated, own_slot, -1))
    tl.store(plan + row, tl.where(is_token, read, SEQUENCE_START), mask=in_plan)
    tl.store(plan + rows + row, tl.where(is_token, write, -1), mask=in_plan)
    tl.store(plan + 2 * rows + row, tl.where(writes_start_slot, source_row, row), mask=in_plan)


@triton.jit(do_not_specialize=["rows", "sequences"])
def _shared_blocks_kernel(
    plan: tl.tensor,
    query_start_loc: tl.tensor,
    seq_lens: tl.tensor,
    block_table: tl.tensor,
    rows: tl.tensor,
    sequences: tl.tensor,
    table_stride: tl.tensor,
    block_size: tl.tensor,
    SEARCHED_SEQUENCES: tl.constexpr,
    IN_BATCH: tl.constexpr,
) -> None:
    """Find the row that computes a sequence's predecessor, if the predecessor is in a block that this step fills."""
    sequence = tl.program_id(0)
    first = tl.load(query_start_loc + sequence)
    end = tl.load(query_start_loc + sequence + 1)
    position = tl.load(seq_lens + sequence) - (end - first) - 1  # the last position before this step
    if (first < end) & (end <= rows) & (position >= 0) & ((position + 1) % block_size == 0):
        block_index = position // block_size  # the same in all block tables that share the block
        block = tl.load(block_table + sequence * table_stride + block_index)
        computing_rows = tl.full([SEARCHED_SEQUENCES], -1, tl.int32)
        for start in range(0, sequences, SEARCHED_SEQUENCES):
            other = start + tl.arange(0, SEARCHED_SEQUENCES)
            inside = other < sequences
            other_first = tl.load(query_start_loc + other, mask=inside, other=0)
            other_end = tl.load(query_start_loc + other + 1, mask=inside, other=0)
            row = other_end - tl.load(seq_lens + other, mask=inside, other=0) + position
            is_computed = (row >= other_first) & (row < other_end)
            other_block = tl.load(block_table + other * table_stride + block_index, mask=is_computed, other=-1)
            computing_rows = tl.maximum(computing_rows, tl.where(is_computed & (other_block == block), row, -1))
        computing_row = tl.max(computing_rows, axis=0)
        tl.store(plan + first, IN_BATCH - computing_row, mask=computing_row >= 0)


def fill_plan(plan: torch.Tensor, step: StateMetadata) -> None:
    """Compute `ops.fill_plan_in_torch`.

    Two launches, safe to replay in a CUDA graph: their inputs keep their addresses.
    """
    rows, sequences, table = plan.shape[1], step.seq_lens.shape[0], step.block_table
    shared_args = (plan, step.query_start_loc, step.seq_lens, table, rows, sequences, table.stride(0), step.block_size)
    _plan_kernel[(triton.cdiv(rows, ROWS),)](
        *shared_args,
        step.slots.per_block,
        step.slots.kept_tokens,
        sequences.bit_length(),
        ROWS=ROWS,
        SEQUENCE_START=SEQUENCE_START,
        IN_BATCH=IN_BATCH,
    )
    _shared_blocks_kernel[(sequences,)](*shared_args, SEARCHED_SEQUENCES=SEARCHED_SEQUENCES, IN_BATCH=IN_BATCH)


@dataclass(frozen=True)
class Norm:
    """Residual to add to a sum and RMS norm to apply to the result, in the same kernel."""

    residual: torch.Tensor
    """[tokens, dim]"""
    weight: torch.Tensor
    """[dim]"""
    epsilon: float


@triton.jit(do_not_specialize=["rows"])
def _shift_add_kernel(
    contributions: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    plan: tl.tensor,
    cache: tl.tensor,
    rows: tl.tensor,
    contributions_stride: tl.tensor,
    residual_stride: tl.tensor,
    out_stride: tl.tensor,
    block_stride: tl.tensor,
    slot_stride: tl.tensor,
    slots: tl.tensor,
    dim: tl.tensor,
    epsilon: tl.tensor,
    DIM: tl.constexpr,  # dim rounded up to a power of two
    HAS_BIAS: tl.constexpr,
    HAS_CACHE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    IN_BATCH: tl.constexpr,
    USE_PDL: tl.constexpr,
) -> None:
    """Write one row of `out`, and store the state that the plan assigns to the row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, DIM)
    inside = column < dim
    read = tl.load(plan + row)
    previous_row = (IN_BATCH - tl.minimum(read, IN_BATCH)).to(tl.int64)
    total = tl.zeros([DIM], tl.float32)
    if HAS_CACHE:
        slot = tl.maximum(read, 0).to(tl.int64)
        state = cache + slot // slots * block_stride + slot % slots * slot_stride
        total += tl.load(state + column, mask=inside & (read >= 0), other=0.0).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_NORM:
        scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
    wait_for_previous_kernel(USE_PDL)  # only `contributions` comes from the previous kernel; the plan is older
    to_self = tl.load(contributions + row * contributions_stride + dim + column, mask=inside, other=0.0).to(tl.float32)
    previous = contributions + previous_row * contributions_stride + column
    from_previous = tl.load(previous, mask=inside & (read <= IN_BATCH), other=0.0)
    total += to_self + from_previous.to(tl.float32)
    if HAS_NORM:
        total *= tl.rsqrt(tl.sum(total * total, axis=0) / dim + epsilon) * scale
    tl.store(out + row * out_stride + column, total.to(out.dtype.element_ty), mask=inside)
    if HAS_CACHE:
        write = tl.load(plan + rows + row)
        if write >= 0:
            source = tl.load(plan + 2 * rows + row).to(tl.int64)
            kept = tl.load(contributions + source * contributions_stride + column, mask=inside, other=0.0)
            slot = write.to(tl.int64)
            state = cache + slot // slots * block_stride + slot % slots * slot_stride
            tl.debug_barrier()  # other threads of this program may have to read this state first
            tl.store(state + column, kept.to(cache.dtype.element_ty), mask=inside)


def shift_add(
    contributions: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    plan: torch.Tensor,
    cache: torch.Tensor | None,
    norm: Norm | None = None,
) -> None:
    """Compute `ops.shift_add_in_torch` and optionally a residual and a norm, with one program per row."""
    rows, dim = out.shape
    if not rows:
        return
    _shift_add_kernel[(rows,)](
        contributions,
        contributions if bias is None else bias,
        contributions if norm is None else norm.residual,
        contributions if norm is None else norm.weight,
        out,
        plan,
        contributions if cache is None else cache,
        plan.shape[1],
        contributions.stride(0),
        0 if norm is None else norm.residual.stride(0),
        out.stride(0),
        0 if cache is None else cache.stride(0),
        0 if cache is None else cache.stride(1),
        1 if cache is None else cache.shape[1],
        dim,
        0.0 if norm is None else norm.epsilon,
        DIM=triton.next_power_of_2(dim),
        HAS_BIAS=bias is not None,
        HAS_CACHE=cache is not None,
        HAS_NORM=norm is not None,
        IN_BATCH=IN_BATCH,
        num_warps=4 if dim <= 2048 else 8,
        **pdl_options(contributions.device),
    )
