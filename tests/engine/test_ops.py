"""Yuan's own operations against what they mean, over schedules that an engine could come up with.

Sequences come in chunks of any size, in any company, share prefixes, and lose drafted tokens again. Whatever the
schedule, each token must get what the token before it made. Where there is a GPU, or Triton's interpreter
(`TRITON_INTERPRET=1` with Triton installed), the kernels are held against the same.
"""

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]  # of vLLM's own, while it is imported

DIM = 24
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def ops() -> Any:
    """The module; imported by a test, for vLLM warns of this and that when it is."""
    from yuan_grpc.model import ops

    return ops


@pytest.fixture
def kernels() -> Any:
    """The module, where it can be used."""
    try:
        import triton
    except ImportError:
        pytest.skip("Triton is not installed")
    if not (torch.cuda.is_available() or triton.knobs.runtime.interpret):
        pytest.skip("no NVIDIA GPU here, and TRITON_INTERPRET is not set")
    from yuan_grpc.model import kernels

    return kernels


@dataclass
class Sequence:
    """What a sequence has so far: its blocks, and of each token what it made for the next one."""

    blocks: list[int]
    made: list[torch.Tensor] = field(default_factory=list)
    drafted: int = 0  # of them, that may be taken back


class Batch:
    """Sequences on their way through a cache, and the steps that a scheduler makes of them."""

    def __init__(self, seed: int, drafts: int, block_size: int) -> None:
        from yuan_grpc.model.state import Slots, StateMetadata

        self.metadata = StateMetadata
        self.random = random.Random(seed)
        self.drafts = drafts
        self.block_size = block_size
        self.slots = Slots(drafts + 1, drafts + 2 if drafts else 1)
        self.free = list(range(1, 400))
        self.random.shuffle(self.free)
        self.cache = torch.full((400, self.slots.in_block, 3 * DIM), torch.nan, device=DEVICE)[..., DIM : 2 * DIM]
        self.sequences: list[Sequence] = []

    def join(self) -> None:
        """A new sequence, which may begin with whole blocks of another."""
        blocks, made = [], []
        if self.sequences and self.random.random() < 0.4:
            other = self.random.choice(self.sequences)
            whole = (len(other.made) - other.drafted) // self.block_size  # of which no token can be taken back
            if whole > 0:
                shared = self.random.randint(1, whole)
                blocks, made = other.blocks[:shared], other.made[: shared * self.block_size]
        self.sequences.append(Sequence(list(blocks), list(made)))

    def step(self) -> tuple[torch.Tensor, Any, torch.Tensor]:
        """What the engine hands to a step, and what must come of it: [rows, 2 * dim], metadata, [rows, dim]."""
        chosen = self.random.sample(self.sequences, self.random.randint(1, len(self.sequences)))
        starts, rows, expected = [0], [], []
        for sequence in chosen:
            lost = self.random.randint(0, sequence.drafted)
            del sequence.made[len(sequence.made) - lost :]
            tokens = self.random.choice([1, 1, 1, self.drafts + 1, self.random.randint(1, 3 * self.block_size)])
            for _ in range(tokens):
                row = torch.randn(2 * DIM)
                before = sequence.made[-1] if sequence.made else torch.zeros(DIM)
                expected.append(before + row[DIM:])
                sequence.made.append(row[:DIM])
                rows.append(row)
            sequence.drafted = min(self.drafts, tokens - 1)
            while len(sequence.blocks) * self.block_size < len(sequence.made):
                sequence.blocks.append(self.free.pop())
            starts.append(len(rows))
        padding = self.random.randint(0, 3)
        table = torch.zeros(len(chosen), 64, dtype=torch.int32)
        for at, sequence in enumerate(chosen):
            table[at, : len(sequence.blocks)] = torch.tensor(sequence.blocks)
        metadata = self.metadata(
            torch.tensor(starts, dtype=torch.int32, device=DEVICE),
            torch.tensor([len(sequence.made) for sequence in chosen], dtype=torch.int32, device=DEVICE),
            table.to(DEVICE),
            self.block_size,
            self.slots,
        )
        parts = torch.stack(rows + [torch.full((2 * DIM,), 7.0)] * padding).to(DEVICE)
        return parts, metadata, torch.stack(expected).to(DEVICE)


@pytest.mark.parametrize("drafts", [0, 1, 3])
@pytest.mark.parametrize("seed", range(6))
def test_each_token_gets_what_the_token_before_made(ops: Any, seed: int, drafts: int) -> None:
    batch = Batch(seed, drafts, block_size=8)
    bias = torch.randn(DIM, device=DEVICE)
    for _ in range(25):
        if len(batch.sequences) < 5:
            batch.join()
        parts, metadata, expected = batch.step()
        plan = ops.new_plan(parts)
        ops.plan_in_torch(plan, metadata)
        out = torch.empty(len(parts), DIM, device=DEVICE)
        ops.shift_add_in_torch(parts, bias, out, plan, batch.cache)
        torch.testing.assert_close(out[: len(expected)], expected + bias)


@pytest.mark.parametrize("drafts", [0, 1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_the_kernels_do_the_same(ops: Any, kernels: Any, seed: int, drafts: int) -> None:
    batch = Batch(seed, drafts, block_size=8)
    bias, weight = torch.randn(2, DIM, device=DEVICE).unbind()
    for _ in range(15):
        if len(batch.sequences) < 5:
            batch.join()
        parts, metadata, expected = batch.step()
        plan, reference = ops.new_plan(parts), ops.new_plan(parts)
        ops.plan_in_torch(reference, metadata)
        kernels.plan(plan, metadata)
        writes = reference[1] >= 0
        assert torch.equal(plan[:2], reference[:2])
        assert torch.equal(plan[2, writes], reference[2, writes])
        before, residual = batch.cache.clone(), torch.randn(len(parts), DIM, device=DEVICE)
        out, normed = torch.empty(2, len(parts), DIM, device=DEVICE).unbind()
        kernels.shift_add(parts, bias, out, plan, batch.cache)
        torch.testing.assert_close(out[: len(expected)], expected + bias)
        kernels.shift_add(parts, bias, normed, plan, before, kernels.Norm(residual, weight, 1e-6))
        summed = (out + residual)[: len(expected)]
        wanted = summed * torch.rsqrt(summed.square().mean(-1, keepdim=True) + 1e-6) * weight
        torch.testing.assert_close(normed[: len(expected)], wanted)
        torch.testing.assert_close(before, batch.cache, equal_nan=True)


def test_a_step_without_sequences_reads_and_keeps_nothing(ops: Any) -> None:
    parts = torch.randn(5, 2 * DIM, device=DEVICE)
    plan = torch.full((3, 5), ops.SEQUENCE_START, dtype=torch.int32, device=DEVICE)
    out = torch.empty(5, DIM, device=DEVICE)
    ops.shift_add_in_torch(parts, None, out, plan, None)
    assert torch.equal(out, parts[:, DIM:])
