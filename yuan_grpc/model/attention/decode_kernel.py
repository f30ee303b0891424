"""Attention kernels for decoding, where each sequence has one new token.

All published models have one key head per query head, so each head reads its keys for a single query. Kernels written
for prompts, or for heads that share keys, do not reach memory bandwidth here. In this module a program handles one head
of a sequence or, if there are few heads, one split of its keys; a second kernel merges the splits. The time is close to
that of reading the keys and values. `write_kv_cache` stores the new tokens' keys and values in a separate launch,
because a sequence may read what another one writes in the same step.
"""

import math

import torch
import triton
import triton.language as tl

from yuan_grpc.model.pdl import pdl_options, wait_for_previous_kernel

TILE = 64
"""Keys loaded at once. With these warps and stages, one of the fastest of 46 measured configurations (H100)."""
WARPS = 4
"""Warps per program."""
STAGES = 2
"""Tiles in flight at once."""
TARGET_PROGRAMS = 1024
"""Number of programs that saturates the memory bandwidth of an H100."""
MAX_COUNTED_PROGRAMS = 4096
"""Largest number of programs if a tensor holds the number of sequences: programs without a sequence take time too."""
MAX_SPLITS = 16
"""Largest number of splits of a head's keys."""
QUERY_ROWS = 16
"""Smallest number of rows that tensor cores multiply; one holds the query and the others are zero."""
MAX_WRITE_TOKENS = 32
"""Largest number of tokens to use `write_kv_cache` for; with 64 tokens vLLM's kernel is as fast."""
WRITE_HEADS = 16
"""Heads written per program of `write_kv_cache`."""


def num_splits_for(heads: int) -> int:
    """Return the number of splits of each head's keys, a power of two, for this number of heads in all sequences."""
    wanted = max(1, min(TARGET_PROGRAMS // heads, MAX_SPLITS))
    return 1 << (wanted.bit_length() - 1)


def write_kv_cache(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """Write new keys and values to the cache.

    Args:
        key: [tokens, heads, head_dim]; there may be more tokens than slots.
        value: the same shape as `key`.
        cache: as in `decode_attention`.
        slots: [tokens], int64: block number times block_size plus the position in the block, or -1 for padding.
    """
    _, heads, dim = key.shape
    _write_kv_cache_kernel[(slots.shape[0], triton.cdiv(heads, WRITE_HEADS))](
        key,
        value,
        cache,
        slots,
        key.stride(0),
        value.stride(0),
        *cache.stride()[:3],
        heads,
        DIM=dim,
        BLOCK_SIZE=cache.shape[2],
        HEADS=WRITE_HEADS,
        num_warps=2,
        **pdl_options(key.device),
    )


def decode_attention(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    num_splits: int | None = None,
    count: torch.Tensor | None = None,
) -> None:
    """Compute softmax(q Kᵀ · scale) V for each head of each sequence, where q is the query of its newest token.

    Args:
        q: [tokens, heads, head_dim]; row i belongs to sequence i, and there may be more rows than sequences.
        cache: [blocks, heads, block_size, 2 * head_dim], each token's key followed by its value, in q's dtype. head_dim
            is a power of two and at least 16.
        block_table: [sequences, blocks], int32.
        seq_lens: [sequences], int32, including the newest token; zero for padding, whose output is zero.
        out: [tokens, heads, head_dim]; the first rows are overwritten.
        scale: scale of the attention scores.
        num_splits: overrides `num_splits_for`.
        count: [1], int32: only this number of leading sequences is computed, and the other rows of `out` are not
            written. A CUDA graph reads it at each replay.
    """
    sequences, (_, heads, dim) = seq_lens.shape[0], q.shape
    num_splits = num_splits or num_splits_for(sequences * heads)
    pdl = pdl_options(q.device)
    is_split = num_splits > 1
    partial_acc = q.new_empty((sequences, heads, num_splits, dim), dtype=torch.float32) if is_split else out
    partial_ml = q.new_empty((sequences, heads, num_splits, 2), dtype=torch.float32) if is_split else out
    programs = sequences if count is None else min(sequences, triton.cdiv(MAX_COUNTED_PROGRAMS, heads))
    _decode_attention_kernel[(heads, programs, num_splits)](
        q,
        cache,
        block_table,
        seq_lens,
        out,
        partial_acc,
        partial_ml,
        count,
        q.stride(0),
        out.stride(0),
        block_table.stride(0),
        *cache.stride()[:3],
        scale / math.log(2),
        DIM=dim,
        BLOCK_SIZE=cache.shape[2],
        TILE=TILE,
        QUERY_ROWS=QUERY_ROWS,
        STAGES=STAGES,
        IS_SPLIT=is_split,
        num_warps=WARPS,
        **pdl,
    )
    if is_split:
        _merge_splits_kernel[(heads, sequences)](
            out, partial_acc, partial_ml, count, out.stride(0), DIM=dim, NUM_SPLITS=num_splits, num_warps=2, **pdl
        )


@triton.jit
def _attend_to_keys(
    query: tl.tensor,
    cache: tl.tensor,  # the start of the head's part
    blocks: tl.tensor,  # the sequence's row of the block table
    start: tl.tensor,
    end: tl.tensor,
    block_stride: tl.tensor,
    token_stride: tl.tensor,
    scale: tl.tensor,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    QUERY_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return the largest score m_i, the sum of weights l_i and the weighted sum of values acc, [DIM], of start to end.

    A position's weight is 2 ** (score - m_i).
    """
    column = tl.arange(0, DIM)
    is_query = tl.arange(0, QUERY_ROWS) == 0
    queries = tl.where(is_query[:, None], query[None, :], 0.0).to(query.dtype)
    m_i = tl.full((QUERY_ROWS,), -float("inf"), tl.float32)
    l_i = tl.zeros((QUERY_ROWS,), tl.float32)
    acc = tl.zeros((QUERY_ROWS, DIM), tl.float32)
    for first in tl.range(start, end, TILE, num_stages=STAGES):
        position = first + tl.arange(0, TILE)
        inside = position < end
        block = tl.load(blocks + position // BLOCK_SIZE, mask=inside, other=0)
        token = block.to(tl.int64) * block_stride + position % BLOCK_SIZE * token_stride
        k = tl.load(cache + token[None, :] + column[:, None], mask=inside[None, :], other=0.0)
        scores = tl.where(inside[None, :], tl.dot(queries, k) * scale, -float("inf"))
        m_new = tl.maximum(m_i, tl.max(scores, axis=1))
        p = tl.exp2(scores - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)
        v = tl.load(cache + DIM + token[:, None] + column[None, :], mask=inside[:, None], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
        l_i = l_i * alpha + tl.sum(p, axis=1)
        m_i = m_new
    return (
        tl.max(tl.where(is_query, m_i, -float("inf")), axis=0),
        tl.sum(tl.where(is_query, l_i, 0.0), axis=0),
        tl.sum(tl.where(is_query[:, None], acc, 0.0), axis=0),
    )


@triton.jit
def _store_mean(out: tl.tensor, acc: tl.tensor, l_i: tl.tensor) -> None:
    """Store the weighted mean of values, or zeros if there are no values."""
    mean = tl.where(l_i > 0, acc / l_i, 0.0)
    tl.store(out, mean.to(out.dtype.element_ty))


@triton.jit
def _decode_attention_kernel(
    q: tl.tensor,
    cache: tl.tensor,
    block_table: tl.tensor,
    seq_lens: tl.tensor,
    out: tl.tensor,
    partial_acc: tl.tensor,
    partial_ml: tl.tensor,
    count: tl.tensor | None,
    q_stride: tl.tensor,
    out_stride: tl.tensor,
    table_stride: tl.tensor,
    block_stride: tl.tensor,
    head_stride: tl.tensor,
    token_stride: tl.tensor,
    scale: tl.tensor,  # includes log2(e), because weights are powers of two
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    QUERY_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    USE_PDL: tl.constexpr,
) -> None:
    """Compute one split of one head: of the program's sequence or, with a count, of every n-th for n programs."""
    head, sequence, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(seq_lens + sequence)
    sequences = sequence + 1 if count is None else tl.load(count)
    turns = 1 if count is None else tl.cdiv(tl.maximum(sequences - sequence, 0), tl.num_programs(1))
    wait_for_previous_kernel(USE_PDL)
    column = tl.arange(0, DIM)
    for _ in range(turns):  # no loop in the compiled kernel without a count
        split_length = tl.cdiv(tl.cdiv(length, TILE), tl.num_programs(2)) * TILE
        start = split * split_length
        end = tl.minimum(start + split_length, length)
        query = tl.load(q + sequence * q_stride + head * DIM + column)
        m_i, l_i, acc = _attend_to_keys(
            query,
            cache + head * head_stride,
            block_table + sequence * table_stride,
            start,
            end,
            block_stride,
            token_stride,
            scale,
            DIM,
            BLOCK_SIZE,
            TILE,
            QUERY_ROWS,
            STAGES,
        )
        if IS_SPLIT:
            index = (sequence * tl.num_programs(0) + head) * tl.num_programs(2) + split
            tl.store(partial_acc + index * DIM + column, acc)
            tl.store(partial_ml + index * 2, m_i)
            tl.store(partial_ml + index * 2 + 1, l_i)
        else:
            _store_mean(out + sequence * out_stride + head * DIM + column, acc, l_i)
        sequence += tl.num_programs(1)
        length = tl.load(seq_lens + sequence, mask=sequence < sequences, other=0)


@triton.jit
def _merge_splits_kernel(
    out: tl.tensor,
    partial_acc: tl.tensor,
    partial_ml: tl.tensor,
    count: tl.tensor | None,
    out_stride: tl.tensor,
    DIM: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    USE_PDL: tl.constexpr,
) -> None:
    """Merge the splits of a head, each scaled by 2 ** (its largest score - the largest score of all splits)."""
    head, sequence = tl.program_id(0), tl.program_id(1)
    wait_for_previous_kernel(USE_PDL)
    if count is not None:  # noqa: SIM102 - decided when the kernel is compiled
        if sequence >= tl.load(count):
            return
    column = tl.arange(0, DIM)
    index = (sequence * tl.num_programs(0) + head) * NUM_SPLITS + tl.arange(0, NUM_SPLITS)
    m_i = tl.load(partial_ml + index * 2)
    l_i = tl.load(partial_ml + index * 2 + 1)
    alpha = tl.where(l_i > 0, tl.exp2(m_i - tl.max(m_i, axis=0)), 0.0)
    acc = tl.sum(tl.load(partial_acc + index[:, None] * DIM + column[None, :]) * alpha[:, None], axis=0)
    _store_mean(out + sequence * out_stride + head * DIM + column, acc, tl.sum(l_i * alpha, axis=0))


@triton.jit
def _write_kv_cache_kernel(
    key: tl.tensor,
    value: tl.tensor,
    cache: tl.tensor,
    slots: tl.tensor,
    key_stride: tl.tensor,
    value_stride: tl.tensor,
    block_stride: tl.tensor,
    head_stride: tl.tensor,
    token_stride: tl.tensor,
    heads: tl.tensor,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    USE_PDL: tl.constexpr,
) -> None:
    token = tl.program_id(0)
    slot = tl.load(slots + token)
    wait_for_previous_kernel(USE_PDL)
    if slot >= 0:
        head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
        column = tl.arange(0, DIM)[None, :]
        inside = head < heads
        target = (
            cache + slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * token_stride + head * head_stride + column
        )
        tl.store(target, tl.load(key + token * key_stride + head * DIM + column, mask=inside), mask=inside)
        tl.store(target + DIM, tl.load(value + token * value_stride + head * DIM + column, mask=inside), mask=inside)
