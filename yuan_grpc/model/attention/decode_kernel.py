"""Attention of decoding, where each sequence has one new token: little slower than reading many keys and values.

All published models have keys of their own for every head of queries, so a head reads its keys for one query alone.
Kernels made for prompts, or for heads that share keys, are not bound by that reading. Here a program owns a head of a
sequence or, if these are few, a part of its keys; parts are put together by a second kernel. `keep` writes the new
tokens' keys and values, in a launch of its own: one sequence may read what another one writes in the same step.
"""

import math

import torch
import triton
import triton.language as tl

from yuan_grpc.model.pdl import early_start, wait_ahead

TILE = 64
"""Keys that are read at once. With these warps and stages, one of the best of 46 ways over all batches on an H100."""
WARPS = 4
STAGES = 2
"""Tiles on their way at once."""
PROGRAMS = 1024
"""As many as keep an H100's memory busy."""
MOST_PARTS = 16
"""Of a head's keys."""
QUERIES = 16
"""The least that tensor cores multiply; there is one, and the rest is zeros."""
MOST_KEPT = 32
"""Tokens that `keep` is for; with 64 vLLM's own kernel is as fast."""
HEADS = 16
"""That a program of `keep` writes."""


def parts_of(heads: int) -> int:
    """Into how many parts, a power of two, the keys of each of so many heads are cut."""
    wanted = max(1, min(PROGRAMS // heads, MOST_PARTS))
    return 1 << (wanted.bit_length() - 1)


def keep(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """Writes new keys and values to their places.

    Args:
        key: [tokens, heads, head_dim], and there may be more tokens than slots.
        value: the same.
        cache: as `attend` has it.
        slots: [tokens], int64: a block's number times block_size, plus the place in it; or -1, for padding.
    """
    _, heads, dim = key.shape
    _keep[(slots.shape[0], triton.cdiv(heads, HEADS))](
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
        HEADS=HEADS,
        num_warps=2,
        **early_start(key.device),
    )


def attend(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    parts: int | None = None,
) -> None:
    """softmax(q Kᵀ · scale) V for each head of each sequence, whose newest token is the one that asks.

    Args:
        q: [tokens, heads, head_dim]: row i is sequence i's, and there may be more rows than sequences.
        cache: [blocks, heads, block_size, 2 * head_dim], a token's keys and then its values; of q's dtype. head_dim is
            a power of two, and at least 16.
        block_table: [sequences, blocks], int32.
        seq_lens: [sequences], int32, the newest token included; zero for padding, which gets zeros.
        out: [tokens, heads, head_dim], whose first rows are overwritten.
        scale: of the products.
        parts: to cut a head's keys into, in place of `parts_of`'s.
    """
    sequences, (_, heads, dim) = seq_lens.shape[0], q.shape
    parts = parts or parts_of(sequences * heads)
    early = early_start(q.device)
    split = parts > 1
    sums = q.new_empty((sequences, heads, parts, dim), dtype=torch.float32) if split else out
    tops = q.new_empty((sequences, heads, parts, 2), dtype=torch.float32) if split else out
    _attend[(heads, sequences, parts)](
        q,
        cache,
        block_table,
        seq_lens,
        out,
        sums,
        tops,
        q.stride(0),
        out.stride(0),
        block_table.stride(0),
        *cache.stride()[:3],
        scale / math.log(2),
        DIM=dim,
        BLOCK_SIZE=cache.shape[2],
        TILE=TILE,
        QUERIES=QUERIES,
        STAGES=STAGES,
        SPLIT=split,
        num_warps=WARPS,
        **early,
    )
    if split:
        _join[(heads, sequences)](out, sums, tops, out.stride(0), DIM=dim, PARTS=parts, num_warps=2, **early)


@triton.jit
def _over_keys(
    query: tl.tensor,
    cache: tl.tensor,  # where the head's part of it begins
    blocks: tl.tensor,  # the sequence's row of the table
    start: tl.tensor,
    end: tl.tensor,
    block_stride: tl.tensor,
    token_stride: tl.tensor,
    scale: tl.tensor,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    STAGES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Of the positions from start to end: the largest score, the sum of weights, and the weighted sum of values, [DIM].

    Weights are powers of two, of how far a score is from the largest.
    """
    column = tl.arange(0, DIM)
    own = tl.arange(0, QUERIES) == 0  # the row of the one query
    queries = tl.where(own[:, None], query[None, :], 0.0).to(query.dtype)
    top = tl.full((QUERIES,), -float("inf"), tl.float32)  # the largest so far
    total = tl.zeros((QUERIES,), tl.float32)
    weighted = tl.zeros((QUERIES, DIM), tl.float32)
    for first in tl.range(start, end, TILE, num_stages=STAGES):
        position = first + tl.arange(0, TILE)
        inside = position < end
        block = tl.load(blocks + position // BLOCK_SIZE, mask=inside, other=0)
        token = block.to(tl.int64) * block_stride + position % BLOCK_SIZE * token_stride
        keys = tl.load(cache + token[None, :] + column[:, None], mask=inside[None, :], other=0.0)
        scores = tl.where(inside[None, :], tl.dot(queries, keys) * scale, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_top[:, None])
        faded = tl.exp2(top - new_top)
        values = tl.load(cache + DIM + token[:, None] + column[None, :], mask=inside[:, None], other=0.0)
        weighted = tl.dot(weights.to(values.dtype), values, weighted * faded[:, None])
        total = total * faded + tl.sum(weights, axis=1)
        top = new_top
    return (
        tl.max(tl.where(own, top, -float("inf")), axis=0),
        tl.sum(tl.where(own, total, 0.0), axis=0),
        tl.sum(tl.where(own[:, None], weighted, 0.0), axis=0),
    )


@triton.jit
def _write(out: tl.tensor, weighted: tl.tensor, total: tl.tensor) -> None:
    """The weighted mean of values; zeros where there are none."""
    mean = tl.where(total > 0, weighted / total, 0.0)
    tl.store(out, mean.to(out.dtype.element_ty))


@triton.jit
def _attend(
    q: tl.tensor,
    cache: tl.tensor,
    block_table: tl.tensor,
    seq_lens: tl.tensor,
    out: tl.tensor,
    sums: tl.tensor,
    tops: tl.tensor,
    q_stride: tl.tensor,
    out_stride: tl.tensor,
    table_stride: tl.tensor,
    block_stride: tl.tensor,
    head_stride: tl.tensor,
    token_stride: tl.tensor,
    scale: tl.tensor,  # for powers of two
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    STAGES: tl.constexpr,
    SPLIT: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    head, sequence, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(seq_lens + sequence)
    share = tl.cdiv(tl.cdiv(length, TILE), tl.num_programs(2)) * TILE
    start = part * share
    end = tl.minimum(start + share, length)
    wait_ahead(EARLY)
    column = tl.arange(0, DIM)
    query = tl.load(q + sequence * q_stride + head * DIM + column)
    top, total, weighted = _over_keys(
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
        QUERIES,
        STAGES,
    )
    if SPLIT:
        place = (sequence * tl.num_programs(0) + head) * tl.num_programs(2) + part
        tl.store(sums + place * DIM + column, weighted)
        tl.store(tops + place * 2, top)
        tl.store(tops + place * 2 + 1, total)
    else:
        _write(out + sequence * out_stride + head * DIM + column, weighted, total)


@triton.jit
def _join(
    out: tl.tensor,
    sums: tl.tensor,
    tops: tl.tensor,
    out_stride: tl.tensor,
    DIM: tl.constexpr,
    PARTS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """Weighs the parts of a head by how far each one's largest score is from the largest of all."""
    head, sequence = tl.program_id(0), tl.program_id(1)
    wait_ahead(EARLY)
    column = tl.arange(0, DIM)
    place = (sequence * tl.num_programs(0) + head) * PARTS + tl.arange(0, PARTS)
    top = tl.load(tops + place * 2)
    total = tl.load(tops + place * 2 + 1)
    weight = tl.where(total > 0, tl.exp2(top - tl.max(top, axis=0)), 0.0)
    weighted = tl.sum(tl.load(sums + place[:, None] * DIM + column[None, :]) * weight[:, None], axis=0)
    _write(out + sequence * out_stride + head * DIM + column, weighted, tl.sum(total * weight, axis=0))


@triton.jit
def _keep(
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
    EARLY: tl.constexpr,
) -> None:
    token = tl.program_id(0)
    slot = tl.load(slots + token)
    wait_ahead(EARLY)
    if slot >= 0:
        head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
        column = tl.arange(0, DIM)[None, :]
        inside = head < heads
        place = (
            cache + slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * token_stride + head * head_stride + column
        )
        tl.store(place, tl.load(key + token * key_stride + head * DIM + column, mask=inside), mask=inside)
        tl.store(place + DIM, tl.load(value + token * value_stride + head * DIM + column, mask=inside), mask=inside)
