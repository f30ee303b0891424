"""Matrix products of one or two tokens with a weight, at the speed of reading the weight.

Steps that only decode one or two sequences consist of such products. They are limited by memory bandwidth, and for
small weights the library's GEMM kernels reach half of it. Here each program owns a few rows of the weight with all
their columns, loads them before it waits for the previous kernel (see `pdl`), and sums in float32. No sum crosses
programs, so a token's result does not depend on the rest of its batch.

This module needs Triton: import it only where there is a GPU. Importing it registers `torch.ops.vllm.yuan_linear`.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import nn
from torch.nn.functional import linear
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.utils import default_unquantized_gemm
from vllm.utils.torch_utils import direct_register_custom_op

from yuan_grpc.model.pdl import pdl_options, wait_for_previous_kernel

MAX_TOKENS = 2
"""Largest number of tokens per product; from three on the library's kernels are as fast, measured on an H200."""

LANE = 8
"""Neighboring columns that one thread loads at once: 16 bytes of a 2-byte type."""


@dataclass(frozen=True)
class Tile:
    """The part of a weight that each program of the kernel computes."""

    rows: int
    """Rows of the weight per program; divides the number of rows."""
    block: int
    """Columns loaded at once: a power of two that divides the width. 256 per warp keep all threads busy."""
    warps: int
    """Warps per program."""


# (rows, columns) of the published 2B model's weights -> the fastest tile measured on an H200. The tile does not depend
# on the number of tokens, because then a token's last bits would depend on the other tokens of its batch.
TILES = {
    (4096, 2048): Tile(8, 1024, 4),
    (4096, 1024): Tile(4, 1024, 4),
    (2048, 2048): Tile(4, 1024, 4),
    (16384, 2048): Tile(8, 1024, 4),
    (2048, 8192): Tile(1, 2048, 8),
}

BYTES_PER_THREAD = 128
"""Bytes of weights in flight per thread; with 1,024 threads this saturates a multiprocessor's memory bandwidth."""


@cache
def tile_for(rows: int, columns: int) -> Tile:
    """Return the measured tile for a weight [rows, columns], or one that keeps `BYTES_PER_THREAD` in flight."""
    if measured := TILES.get((rows, columns)):
        return measured
    block = min(_largest_power_of_two_divisor(columns), 1024 if columns < 8192 else 2048)
    warps = max(1, block // (32 * LANE))
    wanted_rows = max(1, BYTES_PER_THREAD * 32 * warps // (2 * columns))
    return Tile(min(1 << (wanted_rows.bit_length() - 1), _largest_power_of_two_divisor(rows)), block, warps)


def _largest_power_of_two_divisor(number: int) -> int:
    return number & -number


def is_supported(num_tokens: int, weight: torch.Tensor) -> bool:
    """Return whether `skinny_gemm` supports this number of tokens and this weight."""
    return 0 < num_tokens <= MAX_TOKENS and weight.shape[1] % LANE == 0 and weight.is_contiguous()


def skinny_gemm(x: torch.Tensor, weight: torch.Tensor, tile: Tile | None = None) -> torch.Tensor:
    """Compute x Wᵀ.

    Args:
        x: [tokens, columns], in the weight's dtype. Rows may be strided, columns must be contiguous.
        weight: [rows, columns], accepted by `is_supported`.
        tile: overrides `tile_for`.

    Returns:
        [tokens, rows]
    """
    num_tokens, (rows, columns) = x.shape[0], weight.shape
    tile = tile or tile_for(rows, columns)
    out = x.new_empty(num_tokens, rows)
    _skinny_gemm_kernel[(rows // tile.rows,)](
        x,
        weight,
        out,
        x.stride(0),
        TOKENS=num_tokens,
        WIDTH=rows,
        COLUMNS=columns,
        ROWS=tile.rows,
        BLOCK=tile.block,
        num_warps=tile.warps,
        **pdl_options(x.device),
    )
    return out


@triton.jit
def _skinny_gemm_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    x_stride: tl.tensor,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
) -> None:
    """Write ROWS columns of `out`, [TOKENS, WIDTH]. Loops are unrolled, and a tuple serves as an array of tiles."""
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    offsets = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, BLOCK)[None, :]
    tiles = tl.tuple(())
    for chunk in tl.static_range(COLUMNS // BLOCK):  # no other program loads these rows, so caching them is useless
        tiles += (tl.load(weight + first_row * COLUMNS + chunk * BLOCK + offsets, eviction_policy="evict_first"),)
    wait_for_previous_kernel(USE_PDL)  # only weights have been loaded so far
    for token in tl.static_range(TOKENS):
        sums = tl.zeros((ROWS, BLOCK // 8), tl.float32)
        for chunk in tl.static_range(COLUMNS // BLOCK):
            values = tl.load(x + token * x_stride + chunk * BLOCK + tl.arange(0, BLOCK))
            products = tiles[chunk].to(tl.float32) * values.to(tl.float32)[None, :]
            sums += tl.sum(tl.reshape(products, (ROWS, BLOCK // 8, 8)), axis=2)  # groups of 8 lie within a thread
        tl.store(out + token * WIDTH + first_row + tl.arange(0, ROWS), tl.sum(sums, axis=1).to(out.dtype.element_ty))


def yuan_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Compute x Wᵀ, [tokens, rows], on a GPU: with `skinny_gemm` where it is supported."""
    if is_supported(x.shape[0], weight):
        return skinny_gemm(x, weight)
    return torch.mm(x, weight.t())  # `linear` is the same product with twice the overhead on the host


def _fake_yuan_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def use_yuan_linear(model: nn.Module) -> None:
    """Make a model's linear layers use `yuan_linear` where vLLM would leave the choice of the kernel to PyTorch."""

    def multiply(_: nn.Module, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if bias is not None:
            return linear(x, weight, bias)
        result: torch.Tensor = torch.ops.vllm.yuan_linear(x, weight)
        return result

    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, UnquantizedLinearMethod) and method._gemm_impl is default_unquantized_gemm:
            method._gemm_impl = multiply


direct_register_custom_op("yuan_linear", yuan_linear, fake_impl=_fake_yuan_linear)
