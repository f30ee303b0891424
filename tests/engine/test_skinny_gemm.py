"""The products of one or two tokens against torch's: on a GPU, or in Triton's interpreter where there is none."""

from typing import Any

import pytest
import torch
from gpus import DEVICE, kernels_in

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]  # of Triton's own

# Of the largest result; a result is one rounding off, and the interpreter cuts bfloat16 where a GPU rounds it.
CLOSE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 5e-2}


@pytest.fixture
def skinny() -> Any:
    """The module, where its kernel can run."""
    return kernels_in("skinny")


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def assert_torchs(got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    wanted = (x.double() @ weight.double().T).to(x.dtype)
    torch.testing.assert_close(got, wanted, rtol=0, atol=CLOSE[x.dtype] * float(wanted.abs().max()))


@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 64, 256), (2, 96, 512), (2, 48, 96), (1, 32, 4096)])
def test_a_product_is_torchs(skinny: Any, dtype: torch.dtype, tokens: int, rows: int, columns: int) -> None:
    x, weight = random(tokens, columns, dtype=dtype), random(rows, columns, dtype=dtype)
    assert_torchs(skinny.linear(x, weight), x, weight)


def test_rows_of_the_input_may_be_apart(skinny: Any) -> None:
    wide, weight = random(2, 128), random(32, 64)
    assert torch.equal(skinny.linear(wide[:, 32:96], weight), skinny.linear(wide[:, 32:96].contiguous(), weight))


def test_a_token_does_not_depend_on_its_company(skinny: Any) -> None:
    x, weight = random(2, 512), random(64, 512)
    together = skinny.linear(x, weight)
    for token in range(2):
        assert torch.equal(skinny.linear(x[token : token + 1], weight)[0], together[token])


@pytest.mark.parametrize("columns", [96, 1024, 2048, 8192, 32768])
@pytest.mark.parametrize("rows", [48, 2048, 4096, 16384, 135040])
def test_tiles_divide_their_weight(skinny: Any, rows: int, columns: int) -> None:
    tile = skinny.tile_for(rows, columns)
    assert rows % tile.rows == 0
    assert columns % tile.block == 0
    assert tile.block & (tile.block - 1) == 0


def test_measured_tiles_divide_their_weight(skinny: Any) -> None:
    for (rows, columns), tile in skinny.TILES.items():
        assert rows % tile.rows == 0
        assert columns % tile.block == 0


def test_only_few_tokens_and_whole_weights_are_served(skinny: Any) -> None:
    weight = random(32, 64)
    assert skinny.serves(skinny.MOST_TOKENS, weight)
    assert not skinny.serves(0, weight)
    assert not skinny.serves(skinny.MOST_TOKENS + 1, weight)
    assert not skinny.serves(1, weight[:, :32])
    assert not skinny.serves(1, random(32, 60))
