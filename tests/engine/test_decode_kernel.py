"""Decoding attention compared with its formula, on a GPU or in Triton's interpreter."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from gpus import DEVICE, import_kernels

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]  # Triton warns when it is imported

# For values of about one; with 16 bits the weights of the values are rounded too. On GPUs only 16-bit types are used,
# and the interpreter would multiply bfloat16 as integers.
TOLERANCES = {torch.float16: 2e-3} | ({torch.bfloat16: 2e-2} if DEVICE == "cuda" else {torch.float32: 1e-5})
LENGTHS = (1, 15, 64, 0, 65, 700)  # of the sequences; a sequence without tokens is padding


@pytest.fixture
def decode_kernel() -> Any:
    """The module; the test is skipped where its kernels cannot run."""
    return import_kernels("attention.decode_kernel")


@dataclass
class Step:
    """Inputs of attention."""

    q: torch.Tensor
    cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor

    @staticmethod
    def random(
        heads: int = 2,
        dim: int = 64,
        block_size: int = 16,
        dtype: torch.dtype = torch.float16,
        heads_first: bool = False,
    ) -> "Step":
        """Return sequences of `LENGTHS` in shuffled blocks, in one of the layouts that vLLM uses."""
        generator = torch.Generator().manual_seed(heads * dim + block_size)
        blocks = -(-max(LENGTHS) // block_size)
        table = torch.randperm(len(LENGTHS) * blocks, generator=generator).view(len(LENGTHS), blocks).int()
        cache = torch.randn(table.numel(), block_size, heads, 2 * dim, generator=generator).to(DEVICE, dtype)
        cache = cache.transpose(1, 2)
        return Step(
            torch.randn(len(LENGTHS), heads, dim, generator=generator).to(DEVICE, dtype),
            cache.contiguous() if heads_first else cache,
            table.to(DEVICE),
            torch.tensor(LENGTHS, dtype=torch.int32, device=DEVICE),
        )

    def attend(self, decode_kernel: Any, num_splits: int | None = None, count: int | None = None) -> torch.Tensor:
        """Return the output of the kernels."""
        out = torch.full_like(self.q, 7)
        sequences = None if count is None else torch.tensor([count], dtype=torch.int32, device=DEVICE)
        decode_kernel.decode_attention(
            self.q, self.cache, self.block_table, self.seq_lens, out, self.q.shape[-1] ** -0.5, num_splits, sequences
        )
        return out

    def expected(self) -> torch.Tensor:
        """Return the result of the formula."""
        out = torch.zeros_like(self.q, dtype=torch.float64)
        for sequence, length in enumerate(LENGTHS):
            cached = self.cache[self.block_table[sequence].long()].double().transpose(1, 2).flatten(0, 1)[:length]
            keys, values = cached.chunk(2, dim=-1)
            scores = torch.einsum("hd,thd->ht", self.q[sequence].double(), keys) * self.q.shape[-1] ** -0.5
            out[sequence] = torch.einsum("ht,thd->hd", scores.softmax(dim=-1), values)
        return out


def assert_close(actual: torch.Tensor, step: Step) -> None:
    torch.testing.assert_close(actual.double(), step.expected(), rtol=0, atol=TOLERANCES[actual.dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize(("heads", "dim", "block_size"), [(2, 64, 16), (3, 32, 32), (1, 128, 256), (4, 16, 16)])
def test_each_head_attends_to_its_own_keys(
    decode_kernel: Any, dtype: torch.dtype, heads: int, dim: int, block_size: int
) -> None:
    step = Step.random(heads, dim, block_size, dtype)
    assert_close(step.attend(decode_kernel), step)


@pytest.mark.parametrize("num_splits", [1, 2, 8, 16])
def test_keys_may_be_split(decode_kernel: Any, num_splits: int) -> None:
    step = Step.random()
    assert_close(step.attend(decode_kernel, num_splits), step)


@pytest.mark.parametrize("num_splits", [1, 4])
def test_padding_gets_zeros_and_extra_rows_are_not_written(decode_kernel: Any, num_splits: int) -> None:
    step = Step.random()
    step.seq_lens[-1], expected = 0, step.expected()
    step.block_table = step.block_table[:-1]
    step.seq_lens = step.seq_lens[:-1]
    actual = step.attend(decode_kernel, num_splits)
    assert (actual[3] == 0).all()
    assert (actual[-1] == 7).all()
    torch.testing.assert_close(actual[:-1].double(), expected[:-1], rtol=0, atol=TOLERANCES[actual.dtype])


@pytest.mark.parametrize("programs", [1, 2, 4096])
@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize("count", [0, 1, 3, len(LENGTHS)])
def test_only_leading_sequences_are_computed(
    decode_kernel: Any, monkeypatch: pytest.MonkeyPatch, count: int, num_splits: int, programs: int
) -> None:
    monkeypatch.setattr(decode_kernel, "MAX_COUNTED_PROGRAMS", programs)
    step = Step.random()
    actual = step.attend(decode_kernel, num_splits, count)
    assert torch.equal(actual[:count], step.attend(decode_kernel, num_splits)[:count])
    assert (actual[count:] == 7).all()


def test_the_cache_may_have_either_layout(decode_kernel: Any) -> None:
    tokens_first, heads_first = Step.random(), Step.random(heads_first=True)
    assert tokens_first.cache.stride() != heads_first.cache.stride()
    assert torch.equal(tokens_first.attend(decode_kernel), heads_first.attend(decode_kernel))


def test_rows_of_queries_may_be_strided(decode_kernel: Any) -> None:
    step = Step.random()
    expected = step.attend(decode_kernel)
    step.q = torch.cat((step.q, step.q), dim=1)[:, : step.q.shape[1]]
    assert not step.q.is_contiguous()
    assert torch.equal(step.attend(decode_kernel), expected)


@pytest.mark.parametrize("heads", [1, 32, 33, 96, 128, 512, 1000, 1024, 100_000])
def test_fewer_heads_get_more_splits(decode_kernel: Any, heads: int) -> None:
    num_splits = decode_kernel.num_splits_for(heads)
    assert num_splits & (num_splits - 1) == 0
    assert num_splits == 1 if heads > 512 else heads * num_splits <= 1024
    assert num_splits == 16 or heads * num_splits > 512


@pytest.mark.parametrize(("heads", "dim", "heads_first"), [(2, 64, False), (33, 16, True)])
def test_new_keys_and_values_are_written_to_their_slots(
    decode_kernel: Any, heads: int, dim: int, heads_first: bool
) -> None:
    step = Step.random(heads, dim, heads_first=heads_first)
    expected, slots = step.cache.clone(), torch.tensor([3, 100, -1, 31], device=DEVICE)
    key, wide = Step.random(heads, dim).q, Step.random(2 * heads, dim).q  # more rows than slots
    value = wide[:, heads:]
    decode_kernel.write_kv_cache(key, value, step.cache, slots)
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            written = step.cache[slot // 16, :, slot % 16]
            assert torch.equal(written, torch.cat((key[row], value[row]), dim=-1))
            expected[slot // 16, :, slot % 16] = written
    assert torch.equal(step.cache, expected)


def test_cache_offsets_may_exceed_32_bits(decode_kernel: Any) -> None:
    step, far = Step.random(), 2**30
    blocks, heads, block_size, width = 4, *step.cache.shape[1:]
    memory = torch.empty(blocks * far, dtype=step.cache.dtype, device=DEVICE)
    spread = memory.as_strided((blocks, heads, block_size, width), (far, width, heads * width, 1))
    spread[-1] = step.cache[step.block_table[2, 0]]
    step.cache, step.block_table = step.cache[step.block_table[2, :1]], torch.zeros_like(step.block_table[2:3, :1])
    step.q, step.seq_lens = step.q[2:3], step.seq_lens[1:2]
    expected = step.attend(decode_kernel)
    step.cache, step.block_table = spread, step.block_table + blocks - 1
    assert torch.equal(step.attend(decode_kernel), expected)
