"""Attention of decoding against its formula: on a GPU, or in Triton's interpreter where there is none."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from gpus import DEVICE, kernels_in

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]  # of Triton's own

# Of values of about one: in sixteen bits the weights of the values are rounded, too. A GPU is asked for no others, and
# the interpreter would multiply bfloat16 as integers.
CLOSE = {torch.float16: 2e-3} | ({torch.bfloat16: 2e-2} if DEVICE == "cuda" else {torch.float32: 1e-5})
LENGTHS = (1, 15, 64, 0, 65, 700)  # of sequences; the one of no tokens is padding


@pytest.fixture
def decoding() -> Any:
    """The module, where its kernels can run."""
    return kernels_in("decoding")


@dataclass
class Step:
    """What attention is asked for."""

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
        """Sequences of `LENGTHS` in shuffled blocks, laid out as vLLM may lay them out."""
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

    def attended(self, decoding: Any, parts: int | None = None) -> torch.Tensor:
        """What the kernels make of it."""
        out = torch.full_like(self.q, 7)
        decoding.attend(self.q, self.cache, self.block_table, self.seq_lens, out, self.q.shape[-1] ** -0.5, parts)
        return out

    def expected(self) -> torch.Tensor:
        """What the formula says."""
        out = torch.zeros_like(self.q, dtype=torch.float64)
        for sequence, length in enumerate(LENGTHS):
            held = self.cache[self.block_table[sequence].long()].double().transpose(1, 2).flatten(0, 1)[:length]
            keys, values = held.chunk(2, dim=-1)
            scores = torch.einsum("hd,thd->ht", self.q[sequence].double(), keys) * self.q.shape[-1] ** -0.5
            out[sequence] = torch.einsum("ht,thd->hd", scores.softmax(dim=-1), values)
        return out


def assert_close(got: torch.Tensor, step: Step) -> None:
    torch.testing.assert_close(got.double(), step.expected(), rtol=0, atol=CLOSE[got.dtype])


@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
@pytest.mark.parametrize(("heads", "dim", "block_size"), [(2, 64, 16), (3, 32, 32), (1, 128, 256), (4, 16, 16)])
def test_each_head_attends_to_its_own_keys(
    decoding: Any, dtype: torch.dtype, heads: int, dim: int, block_size: int
) -> None:
    step = Step.random(heads, dim, block_size, dtype)
    assert_close(step.attended(decoding), step)


@pytest.mark.parametrize("parts", [1, 2, 8, 16])
def test_keys_may_be_cut_into_parts(decoding: Any, parts: int) -> None:
    step = Step.random()
    assert_close(step.attended(decoding, parts), step)


@pytest.mark.parametrize("parts", [1, 4])
def test_padding_gets_zeros_and_other_rows_nothing(decoding: Any, parts: int) -> None:
    step = Step.random()
    step.seq_lens[-1], wanted = 0, step.expected()
    step.block_table = step.block_table[:-1]
    step.seq_lens = step.seq_lens[:-1]
    got = step.attended(decoding, parts)
    assert (got[3] == 0).all()
    assert (got[-1] == 7).all()
    torch.testing.assert_close(got[:-1].double(), wanted[:-1], rtol=0, atol=CLOSE[got.dtype])


def test_the_cache_may_have_either_layout(decoding: Any) -> None:
    tokens_first, heads_first = Step.random(), Step.random(heads_first=True)
    assert tokens_first.cache.stride() != heads_first.cache.stride()
    assert torch.equal(tokens_first.attended(decoding), heads_first.attended(decoding))


def test_rows_of_queries_may_be_apart(decoding: Any) -> None:
    step = Step.random()
    wanted = step.attended(decoding)
    step.q = torch.cat((step.q, step.q), dim=1)[:, : step.q.shape[1]]
    assert not step.q.is_contiguous()
    assert torch.equal(step.attended(decoding), wanted)


@pytest.mark.parametrize("heads", [1, 32, 33, 96, 128, 512, 1000, 1024, 100_000])
def test_few_heads_are_cut_into_many_parts(decoding: Any, heads: int) -> None:
    parts = decoding.parts_of(heads)
    assert parts & (parts - 1) == 0
    assert parts == 1 if heads > 512 else heads * parts <= 1024
    assert parts == 16 or heads * parts > 512


@pytest.mark.parametrize(("heads", "dim", "heads_first"), [(2, 64, False), (33, 16, True)])
def test_new_keys_and_values_are_kept_in_their_slots(decoding: Any, heads: int, dim: int, heads_first: bool) -> None:
    step = Step.random(heads, dim, heads_first=heads_first)
    before, slots = step.cache.clone(), torch.tensor([3, 100, -1, 31], device=DEVICE)
    key, wide = Step.random(heads, dim).q, Step.random(2 * heads, dim).q  # more rows than slots
    value = wide[:, heads:]
    decoding.keep(key, value, step.cache, slots)
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            kept = step.cache[slot // 16, :, slot % 16]
            assert torch.equal(kept, torch.cat((key[row], value[row]), dim=-1))
            before[slot // 16, :, slot % 16] = kept
    assert torch.equal(step.cache, before)


def test_a_cache_may_be_larger_than_32_bits_count(decoding: Any) -> None:
    step, far = Step.random(), 2**30
    blocks, heads, block_size, width = 4, *step.cache.shape[1:]
    memory = torch.empty(blocks * far, dtype=step.cache.dtype, device=DEVICE)
    spread = memory.as_strided((blocks, heads, block_size, width), (far, width, heads * width, 1))
    spread[-1] = step.cache[step.block_table[2, 0]]
    step.cache, step.block_table = step.cache[step.block_table[2, :1]], torch.zeros_like(step.block_table[2:3, :1])
    step.q, step.seq_lens = step.q[2:3], step.seq_lens[1:2]
    wanted = step.attended(decoding)
    step.cache, step.block_table = spread, step.block_table + blocks - 1
    assert torch.equal(step.attended(decoding), wanted)
