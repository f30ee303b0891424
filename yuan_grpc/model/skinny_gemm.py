"""Products of one or two tokens with a whole weight: what decoding alone does, at the speed of reading the weight.

Such a product is bound by reading its weight, and with small weights the library's kernels for matrices reach half the
bandwidth. A program here owns a few rows of the weight and all their columns, asks for them before it waits for the
kernel before it to end (see `early`), and sums in float32. No sum crosses programs, so a token's result depends on
nothing else in its batch.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from yuan_grpc.model.pdl import early_start, wait_ahead

MOST_TOKENS = 2
"""With three or more the library's kernels are as fast: measured on an H200."""

LANE = 8
"""Neighbouring columns that one thread reads at once: 16 bytes of a 2-byte type."""


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut up."""

    rows: int
    """Of the weight, for each program; divides their number."""
    block: int
    """Columns read at once, a power of two that divides the width; 256 for each warp keeps all threads busy."""
    warps: int
    """For each program."""


# The weight's (rows, columns) -> the fastest tile seen on an H200, for the published 2B model. One for all numbers of
# tokens: a tile of its own for each would make a token's last bits depend on its company.
TILES = {
    (4096, 2048): Tile(8, 1024, 4),
    (4096, 1024): Tile(4, 1024, 4),
    (2048, 2048): Tile(4, 1024, 4),
    (16384, 2048): Tile(8, 1024, 4),
    (2048, 8192): Tile(1, 2048, 8),
}

BYTES_PER_THREAD = 128
"""Of weights in flight: at 1,024 threads, enough for a multiprocessor to keep its memory busy."""


@cache
def tile_for(rows: int, columns: int) -> Tile:
    """The measured tile for a weight [rows, columns], or else one that keeps `BYTES_PER_THREAD` in flight."""
    if known := TILES.get((rows, columns)):
        return known
    block = min(_power_of_two_in(columns), 1024 if columns < 8192 else 2048)
    warps = max(1, block // (32 * LANE))
    wanted = max(1, BYTES_PER_THREAD * 32 * warps // (2 * columns))
    return Tile(min(1 << (wanted.bit_length() - 1), _power_of_two_in(rows)), block, warps)


def _power_of_two_in(number: int) -> int:
    """The largest power of two that divides `number`."""
    return number & -number


def serves(tokens: int, weight: torch.Tensor) -> bool:
    """Whether `linear` takes so many tokens and a weight of such a shape."""
    return 0 < tokens <= MOST_TOKENS and weight.shape[1] % LANE == 0 and weight.is_contiguous()


def linear(x: torch.Tensor, weight: torch.Tensor, tile: Tile | None = None) -> torch.Tensor:
    """x Wᵀ.

    Args:
        x: [tokens, columns], of the weight's dtype; its rows may be apart, its columns may not.
        weight: [rows, columns], which `serves` has been asked about.
        tile: to use in place of `tile_for`'s.

    Returns:
        [tokens, rows]
    """
    tokens, (rows, columns) = x.shape[0], weight.shape
    tile = tile or tile_for(rows, columns)
    out = x.new_empty(tokens, rows)
    _product[(rows // tile.rows,)](
        x,
        weight,
        out,
        x.stride(0),
        TOKENS=tokens,
        WIDTH=rows,
        COLUMNS=columns,
        ROWS=tile.rows,
        BLOCK=tile.block,
        num_warps=tile.warps,
        **early_start(x.device),
    )
    return out


@triton.jit
def _product(
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    x_stride: tl.tensor,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """Writes ROWS columns of `out`, [TOKENS, WIDTH]. Loops are unrolled, and a tuple stands for an array of tiles."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, BLOCK)[None, :]
    tiles = tl.tuple(())
    for chunk in tl.static_range(COLUMNS // BLOCK):  # no other program needs these rows, so no cache need keep them
        tiles += (tl.load(weight + first * COLUMNS + chunk * BLOCK + at, eviction_policy="evict_first"),)
    wait_ahead(EARLY)  # only weights were read so far
    for token in tl.static_range(TOKENS):
        sums = tl.zeros((ROWS, BLOCK // 8), tl.float32)
        for chunk in tl.static_range(COLUMNS // BLOCK):
            values = tl.load(x + token * x_stride + chunk * BLOCK + tl.arange(0, BLOCK))
            products = tiles[chunk].to(tl.float32) * values.to(tl.float32)[None, :]
            sums += tl.sum(tl.reshape(products, (ROWS, BLOCK // 8, 8)), axis=2)  # eights, which lie within a thread
        tl.store(out + token * WIDTH + first + tl.arange(0, ROWS), tl.sum(sums, axis=1).to(out.dtype.element_ty))
