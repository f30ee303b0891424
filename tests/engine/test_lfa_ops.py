"""Yuan's own operations against what they mean, over schedules that an engine could come up with.

Sequences come in chunks of any size, in any company and order, share prefixes, those that the same step computes among
them, and lose drafted tokens again. Whatever the schedule, each token must get what the token before it made. Where
there is a GPU, or Triton's interpreter (`TRITON_INTERPRET=1` with Triton installed), the kernels are held against the
same.
"""

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from gpus import DEVICE, kernels_in

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]  # of vLLM's own, while it is imported

DIM = 24


@pytest.fixture
def ops() -> Any:
    """The module; imported by a test, for vLLM warns of this and that when it is."""
    from yuan_grpc.model.lfa import ops

    return ops


@pytest.fixture
def kernels() -> Any:
    """The module, where it can be used."""
    return kernels_in("kernels")


Rows = list[tuple[torch.Tensor, torch.Tensor]]
"""What a step is given for each token of a sequence, [2 * dim], and what must come of it, [dim]."""


@dataclass
class Sequence:
    """What a sequence has so far: its blocks, and of each token what it made for the next one."""

    blocks: list[int]
    made: list[torch.Tensor] = field(default_factory=list)
    drafted: int = 0  # of them, that may be taken back


@dataclass
class Step:
    """What the engine hands to a step, and what must come of it."""

    parts: torch.Tensor
    """[rows, 2 * dim]"""
    metadata: Any
    expected: torch.Tensor
    """[rows less padding, dim]"""


class Batch:
    """Sequences on their way through a cache, and the steps that a scheduler makes of them."""

    def __init__(self, seed: int, drafts: int = 0, block_size: int = 8) -> None:
        from yuan_grpc.model.lfa.cache import Slots, StateMetadata

        self.metadata = StateMetadata
        self.random = random.Random(seed)
        self.drafts = drafts
        self.block_size = block_size
        self.slots = Slots(drafts + 1, drafts + 2 if drafts else 1)
        self.free = list(range(1, 800))
        self.random.shuffle(self.free)
        self.cache = torch.full((800, self.slots.in_block, 3 * DIM), torch.nan, device=DEVICE)[..., DIM : 2 * DIM]
        self.sequences: list[Sequence] = []

    def join(self, other: Sequence | None = None) -> Sequence:
        """A new sequence, which begins with all whole blocks of another, if one is given."""
        sequence = Sequence([])
        if other is not None:
            whole = (len(other.made) - other.drafted) // self.block_size  # of which no token can be taken back
            shared = whole * self.block_size
            sequence = Sequence(other.blocks[:whole], other.made[:shared])
        self.sequences.append(sequence)
        return sequence

    def random_join(self) -> Sequence:
        """A new sequence, which may begin with whole blocks of another."""
        others = self.sequences and self.random.random() < 0.6
        return self.join(self.random.choice(self.sequences) if others else None)

    def random_step(self) -> Step:
        """Some of the sequences, and newcomers, who may share what this very step computes; in any order."""
        if len(self.sequences) > 6:
            self.sequences.remove(self.random.choice(self.sequences))
        chosen = self.random.sample(self.sequences, self.random.randint(0, len(self.sequences)))
        scheduled = [(sequence, self.schedule(sequence, self.some())) for sequence in chosen]
        for _ in range(self.random.randint(0 if scheduled else 1, 2)):
            newcomer = self.random_join()
            scheduled.append((newcomer, self.schedule(newcomer, self.some())))
        self.random.shuffle(scheduled)
        return self.step(scheduled, padding=self.random.randint(0, 3))

    def some(self) -> int:
        """How many tokens a sequence may get in a step: one, drafts, or a chunk of a prompt."""
        return self.random.choice([1, 1, 1, self.drafts + 1, self.random.randint(1, 3 * self.block_size)])

    def schedule(self, sequence: Sequence, tokens: int) -> Rows:
        """Gives a sequence so many tokens more."""
        lost = self.random.randint(0, sequence.drafted)
        del sequence.made[len(sequence.made) - lost :]
        rows = []
        for _ in range(tokens):
            row = torch.randn(2 * DIM)
            before = sequence.made[-1] if sequence.made else torch.zeros(DIM)
            sequence.made.append(row[:DIM])
            rows.append((row, before + row[DIM:]))
        sequence.drafted = min(self.drafts, tokens - 1)
        while len(sequence.blocks) * self.block_size < len(sequence.made):
            sequence.blocks.append(self.free.pop())
        return rows

    def step(self, scheduled: list[tuple[Sequence, Rows]], padding: int = 0) -> Step:
        """Lays out a step of sequences and their rows."""
        starts, rows = [0], []
        used = [block for sequence, _ in scheduled for block in sequence.blocks]
        table = torch.tensor([self.random.choices(used, k=64) for _ in scheduled])  # what longer ones left there
        for at, (sequence, of_sequence) in enumerate(scheduled):
            rows += of_sequence
            starts.append(len(rows))
            table[at, : len(sequence.blocks)] = torch.tensor(sequence.blocks)
        lengths = [len(sequence.made) for sequence, _ in scheduled]
        metadata = self.metadata(
            torch.tensor(starts, dtype=torch.int32, device=DEVICE),
            torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
            table.int().to(DEVICE),
            self.block_size,
            self.slots,
        )
        parts = torch.stack([row for row, _ in rows] + [torch.full((2 * DIM,), 7.0)] * padding).to(DEVICE)
        return Step(parts, metadata, torch.stack([expected for _, expected in rows]).to(DEVICE))


def in_torch(ops: Any, batch: Batch, step: Step, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The plan of a step and what comes of its rows, padding left out; the batch's cache keeps its states."""
    plan = ops.new_plan(step.parts)
    ops.plan_in_torch(plan, step.metadata)
    out = torch.empty(len(step.parts), DIM, device=DEVICE)
    ops.shift_add_in_torch(step.parts, bias, out, plan, batch.cache)
    return plan, out[: len(step.expected)]


@pytest.mark.parametrize("drafts", [0, 1, 3])
@pytest.mark.parametrize("seed", range(8))
def test_each_token_gets_what_the_token_before_made(ops: Any, seed: int, drafts: int) -> None:
    batch = Batch(seed, drafts)
    bias = torch.randn(DIM, device=DEVICE)
    for _ in range(25):
        step = batch.random_step()
        _, out = in_torch(ops, batch, step, bias)
        torch.testing.assert_close(out, step.expected + bias)


@pytest.mark.parametrize("drafts", [0, 1, 3])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_newcomer_may_begin_with_blocks_that_this_step_computes(ops: Any, drafts: int, reverse: bool) -> None:
    batch = Batch(0, drafts)
    first = batch.join()
    scheduled = [(first, batch.schedule(first, 20))]
    second = batch.join(first)
    scheduled.append((second, batch.schedule(second, 12)))
    third = batch.join(second)
    scheduled.append((third, batch.schedule(third, 1)))
    assert second.blocks[:2] == third.blocks[:2] == first.blocks[:2]
    assert third.blocks[2] == second.blocks[2] != first.blocks[2]
    step = batch.step(scheduled[::-1] if reverse else scheduled)
    _, out = in_torch(ops, batch, step)
    torch.testing.assert_close(out, step.expected)


@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_a_newcomer_may_begin_with_a_block_that_decoding_fills_in_this_step(ops: Any, drafts: int) -> None:
    batch = Batch(0, drafts)
    decoding = batch.join()
    in_torch(ops, batch, batch.step([(decoding, batch.schedule(decoding, 7))]))
    decoding.drafted = 0  # whatever was drafted has been taken
    filling = batch.schedule(decoding, 1)  # in one slot, it is the row that reads the slot and is given it to write
    newcomer = batch.join(decoding)
    assert len(newcomer.made) == 8
    step = batch.step([(newcomer, batch.schedule(newcomer, 3)), (decoding, filling)])
    plan, out = in_torch(ops, batch, step)
    torch.testing.assert_close(out, step.expected)
    assert plan[1, 3] == decoding.blocks[0] * batch.slots.in_block + 7 % batch.slots.in_block
    afterwards = batch.step([(newcomer, batch.schedule(newcomer, 1)), (decoding, batch.schedule(decoding, 1))])
    torch.testing.assert_close(in_torch(ops, batch, afterwards)[1], afterwards.expected)


def test_what_an_earlier_step_computed_is_read_from_its_slot(ops: Any) -> None:
    batch = Batch(0)
    first = batch.join()
    in_torch(ops, batch, batch.step([(first, batch.schedule(first, 20))]))
    second = batch.join(first)
    step = batch.step([(second, batch.schedule(second, 2)), (first, batch.schedule(first, 2))])
    plan, out = in_torch(ops, batch, step)
    assert plan[0].tolist() == [first.blocks[1], -2, first.blocks[2], -4]
    torch.testing.assert_close(out, step.expected)


@pytest.mark.parametrize("drafts", [0, 1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_the_kernels_do_the_same(
    ops: Any, kernels: Any, monkeypatch: pytest.MonkeyPatch, seed: int, drafts: int
) -> None:
    monkeypatch.setattr(kernels, "OTHERS", 2)  # so that few sequences are many
    batch = Batch(seed, drafts)
    bias, weight = torch.randn(2, DIM, device=DEVICE).unbind()
    for _ in range(15):
        step = batch.random_step()
        plan, before = ops.new_plan(step.parts), batch.cache.clone()
        kernels.plan(plan, step.metadata)
        reference, out = in_torch(ops, batch, step, bias)
        writes = reference[1] >= 0
        assert torch.equal(plan[:2], reference[:2])
        assert torch.equal(plan[2, writes], reference[2, writes])
        for norm in (False, True):
            cache, residual = before.clone(), torch.randn(len(step.parts), DIM, device=DEVICE)
            got = torch.empty(len(step.parts), DIM, device=DEVICE)
            added = kernels.Norm(residual, weight, 1e-6) if norm else None
            kernels.shift_add(step.parts, bias, got, plan, cache, added)
            summed = out + residual[: len(out)]
            normed = summed * torch.rsqrt(summed.square().mean(-1, keepdim=True) + 1e-6) * weight
            torch.testing.assert_close(got[: len(out)], normed if norm else out)
            torch.testing.assert_close(cache, batch.cache, equal_nan=True)


def test_a_step_without_sequences_reads_and_keeps_nothing(ops: Any) -> None:
    parts = torch.randn(5, 2 * DIM, device=DEVICE)
    plan = torch.full((3, 5), ops.SEQUENCE_START, dtype=torch.int32, device=DEVICE)
    out = torch.empty(5, DIM, device=DEVICE)
    ops.shift_add_in_torch(parts, None, out, plan, None)
    assert torch.equal(out, parts[:, DIM:])


def test_graphs_are_broken_for_a_plan_if_vllm_asks_for_it_after_the_import(
    ops: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken: list[tuple[Any, ...]] = []
    monkeypatch.setattr(ops, "eager_break_during_capture", lambda _: lambda *arguments: broken.append(arguments))
    plan = torch.empty(3, 5)
    ops.plan(plan, "layer")
    assert broken == [(plan, "layer")]


def test_what_is_compiled_for_one_layer_does_for_another(ops: Any) -> None:
    """A name that were a constant of the graph would have torch.compile begin anew with every layer."""
    from vllm.utils.torch_utils import _encode_layer_name

    compiled = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Any:
        compiled.append(graph.code)
        return lambda *_: ()

    for layer in ("layers.0", "layers.1"):
        name = _encode_layer_name(layer)

        @torch.compile(backend=backend, fullgraph=True)
        def filtered(parts: torch.Tensor, out: torch.Tensor, plan: torch.Tensor, name: Any = name) -> None:
            torch.ops.vllm.yuan_shift_add(parts, None, out, plan, name, 0)

        filtered(torch.zeros(1, 4), torch.zeros(1, 2), torch.zeros((3, 1), dtype=torch.int32))
    first, second = compiled
    assert "yuan_shift_add" in first
    assert first == second
