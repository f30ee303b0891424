"""Triton kernels of `ops`, for GPUs: the same for prompts, decoding and both together."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from yuan_grpc.model.lfa.cache import IN_BATCH, SEQUENCE_START, StateMetadata
from yuan_grpc.model.pdl import early_start, wait_ahead

ROWS = 128
"""Of a batch, to a program of `plan`."""

OTHERS = 128
"""Sequences that a program looks at at once, for one that computes what it seeks."""


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
    """The slot of a position: its block's, by the sequence's table, then its turn among the block's slots."""
    block = tl.load(block_table + sequence * table_stride + position // block_size, mask=mask, other=0)
    return block * slots + position % block_size % slots


@triton.jit(do_not_specialize=["rows", "sequences", "steps"])  # which change from step to step
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
    steps: tl.tensor,  # of the search: 2 ** steps > sequences
    ROWS: tl.constexpr,
    SEQUENCE_START: tl.constexpr,
    IN_BATCH: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_plan = row < rows
    # The last sequence that starts at or before the row, for those without rows start where the next one does.
    low = tl.zeros([ROWS], tl.int32)
    high = tl.zeros([ROWS], tl.int32) + sequences
    for _ in range(steps):
        middle = (low + high) // 2
        searching = low < high
        upper_half = searching & (tl.load(query_start_loc + middle) <= row)
        low = tl.where(upper_half, middle + 1, low)
        high = tl.where(searching & ~upper_half, middle, high)
    sequence = tl.maximum(low - 1, 0)
    first = tl.load(query_start_loc + sequence)
    last = tl.load(query_start_loc + sequence + 1) - 1
    position = tl.load(seq_lens + sequence) - 1 - last + row
    present = in_plan & (row <= last) & (position >= 0)
    position = tl.maximum(position, 0)
    begun = present & (position > row - first)
    start = tl.maximum(position - (row - first) - 1, 0)  # the position before this step
    begins = _slot(block_table, sequence, start, table_stride, block_size, slots, begun)
    own = _slot(block_table, sequence, position, table_stride, block_size, slots, present)
    at_end = position % block_size == block_size - 1
    kept = present & (at_end | (last - row < kept_tokens))
    handed = kept & begun & (own == begins)
    # A sequence's first row writes what the one that is handed over would: find that one from the first row's side.
    in_block = position + (last - row) - start // block_size * block_size  # the last position, seen from that block
    in_block = tl.minimum(in_block, block_size - 1)
    turn = start % block_size
    taken = turn + (in_block - turn) // slots * slots
    row_taken = first + taken - turn - 1
    takes = begun & (row == first) & (taken > turn)
    takes = takes & ((taken == block_size - 1) | (last - row_taken < kept_tokens))
    read = tl.where(row == first, tl.where(begun, begins, SEQUENCE_START), IN_BATCH + 1 - row)
    write = tl.where(takes, begins, tl.where(kept & ~handed, own, -1))
    tl.store(plan + row, tl.where(present, read, SEQUENCE_START), mask=in_plan)
    tl.store(plan + rows + row, tl.where(present, write, -1), mask=in_plan)
    tl.store(plan + 2 * rows + row, tl.where(takes, row_taken, row), mask=in_plan)


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
    OTHERS: tl.constexpr,
    IN_BATCH: tl.constexpr,
) -> None:
    """For a sequence that begins at a block's end: the row that computes it in this step, where one does."""
    sequence = tl.program_id(0)
    first = tl.load(query_start_loc + sequence)
    end = tl.load(query_start_loc + sequence + 1)
    position = tl.load(seq_lens + sequence) - (end - first) - 1  # the last before this step
    if (first < end) & (end <= rows) & (position >= 0) & ((position + 1) % block_size == 0):
        place = position // block_size  # of the block, in all tables that have it
        block = tl.load(block_table + sequence * table_stride + place)
        makers = tl.full([OTHERS], -1, tl.int32)
        for start in range(0, sequences, OTHERS):
            other = start + tl.arange(0, OTHERS)
            inside = other < sequences
            others_first = tl.load(query_start_loc + other, mask=inside, other=0)
            others_end = tl.load(query_start_loc + other + 1, mask=inside, other=0)
            row = others_end - tl.load(seq_lens + other, mask=inside, other=0) + position
            computes = (row >= others_first) & (row < others_end)
            others_block = tl.load(block_table + other * table_stride + place, mask=computes, other=-1)
            makers = tl.maximum(makers, tl.where(computes & (others_block == block), row, -1))
        maker = tl.max(makers, axis=0)
        tl.store(plan + first, IN_BATCH - maker, mask=maker >= 0)


def plan(plan: torch.Tensor, step: StateMetadata) -> None:
    """`ops.plan_in_torch` in two launches, from nothing but tensors that keep their places from step to step."""
    rows, sequences, table = plan.shape[1], step.seq_lens.shape[0], step.block_table
    schedule = (plan, step.query_start_loc, step.seq_lens, table, rows, sequences, table.stride(0), step.block_size)
    _plan_kernel[(triton.cdiv(rows, ROWS),)](
        *schedule,
        step.slots.in_block,
        step.slots.kept,
        sequences.bit_length(),
        ROWS=ROWS,
        SEQUENCE_START=SEQUENCE_START,
        IN_BATCH=IN_BATCH,
    )
    _shared_blocks_kernel[(sequences,)](*schedule, OTHERS=OTHERS, IN_BATCH=IN_BATCH)


@dataclass(frozen=True)
class Norm:
    """What follows a sum at once: a residual to add, and an RMS norm."""

    residual: torch.Tensor
    """[tokens, dim]"""
    weight: torch.Tensor
    """[dim]"""
    epsilon: float


@triton.jit(do_not_specialize=["rows"])
def _shift_add_kernel(
    parts: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    plan: tl.tensor,
    cache: tl.tensor,
    rows: tl.tensor,
    parts_stride: tl.tensor,
    residual_stride: tl.tensor,
    out_stride: tl.tensor,
    block_stride: tl.tensor,
    slot_stride: tl.tensor,
    slots: tl.tensor,
    dim: tl.tensor,
    epsilon: tl.tensor,
    DIM: tl.constexpr,  # dim, rounded up to a power of two
    HAS_BIAS: tl.constexpr,
    HAS_CACHE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    IN_BATCH: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, DIM)
    inside = column < dim
    read = tl.load(plan + row)
    row_before = (IN_BATCH - tl.minimum(read, IN_BATCH)).to(tl.int64)
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
    wait_ahead(EARLY)  # only `parts` is of the kernel ahead; the plan was made before the first layer
    own = tl.load(parts + row * parts_stride + dim + column, mask=inside, other=0.0).to(tl.float32)
    before = tl.load(parts + row_before * parts_stride + column, mask=inside & (read <= IN_BATCH), other=0.0)
    total += own + before.to(tl.float32)
    if HAS_NORM:
        total *= tl.rsqrt(tl.sum(total * total, axis=0) / dim + epsilon) * scale
    tl.store(out + row * out_stride + column, total.to(out.dtype.element_ty), mask=inside)
    if HAS_CACHE:
        write = tl.load(plan + rows + row)
        if write >= 0:
            source = tl.load(plan + 2 * rows + row).to(tl.int64)
            kept = tl.load(parts + source * parts_stride + column, mask=inside, other=0.0)
            slot = write.to(tl.int64)
            state = cache + slot // slots * block_stride + slot % slots * slot_stride
            tl.debug_barrier()  # it may be the state that was read above, by other threads of this program
            tl.store(state + column, kept.to(cache.dtype.element_ty), mask=inside)


def shift_add(
    parts: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    plan: torch.Tensor,
    cache: torch.Tensor | None,
    norm: Norm | None = None,
) -> None:
    """`ops.shift_add_in_torch`, and a residual and a norm on top if there is one, a program for each row."""
    rows, dim = out.shape
    if not rows:
        return
    _shift_add_kernel[(rows,)](
        parts,
        parts if bias is None else bias,
        parts if norm is None else norm.residual,
        parts if norm is None else norm.weight,
        out,
        plan,
        parts if cache is None else cache,
        plan.shape[1],
        parts.stride(0),
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
        **early_start(parts.device),
    )
