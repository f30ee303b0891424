"""Products of one or two tokens compared with torch, on a GPU or in Triton's interpreter."""

from typing import Any

import pytest
import torch
from gpus import DEVICE, import_kernels

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]  # Triton and vLLM warn when they are imported

# Relative to the largest result. Results differ by one rounding, and the interpreter truncates bfloat16.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 5e-2}


@pytest.fixture
def skinny_gemm() -> Any:
    """The module; the test is skipped where its kernel cannot run."""
    return import_kernels("skinny_gemm")


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def assert_product(actual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    expected = (x.double() @ weight.double().T).to(x.dtype)
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCES[x.dtype] * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 64, 256), (2, 96, 512), (2, 48, 96), (1, 32, 4096)])
def test_a_product_matches_torch(skinny_gemm: Any, dtype: torch.dtype, tokens: int, rows: int, columns: int) -> None:
    x, weight = random(tokens, columns, dtype=dtype), random(rows, columns, dtype=dtype)
    assert_product(skinny_gemm.skinny_gemm(x, weight), x, weight)


def test_rows_of_the_input_may_be_strided(skinny_gemm: Any) -> None:
    wide, weight = random(2, 128), random(32, 64)
    assert torch.equal(
        skinny_gemm.skinny_gemm(wide[:, 32:96], weight),
        skinny_gemm.skinny_gemm(wide[:, 32:96].contiguous(), weight),
    )


def test_a_token_does_not_depend_on_the_other_tokens(skinny_gemm: Any) -> None:
    x, weight = random(2, 512), random(64, 512)
    together = skinny_gemm.skinny_gemm(x, weight)
    for token in range(2):
        assert torch.equal(skinny_gemm.skinny_gemm(x[token : token + 1], weight)[0], together[token])


@pytest.mark.parametrize("columns", [96, 1024, 2048, 8192, 32768])
@pytest.mark.parametrize("rows", [48, 2048, 4096, 16384, 135040])
def test_tiles_divide_their_weight(skinny_gemm: Any, rows: int, columns: int) -> None:
    tile = skinny_gemm.tile_for(rows, columns)
    assert rows % tile.rows == 0
    assert columns % tile.block == 0
    assert tile.block & (tile.block - 1) == 0


def test_measured_tiles_divide_their_weight(skinny_gemm: Any) -> None:
    for (rows, columns), tile in skinny_gemm.TILES.items():
        assert rows % tile.rows == 0
        assert columns % tile.block == 0


def test_only_few_tokens_and_contiguous_weights_are_supported(skinny_gemm: Any) -> None:
    weight = random(32, 64)
    assert skinny_gemm.is_supported(skinny_gemm.MAX_TOKENS, weight)
    assert not skinny_gemm.is_supported(0, weight)
    assert not skinny_gemm.is_supported(skinny_gemm.MAX_TOKENS + 1, weight)
    assert not skinny_gemm.is_supported(1, weight[:, :32])
    assert not skinny_gemm.is_supported(1, random(32, 60))
