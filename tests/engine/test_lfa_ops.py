"""LFA's operations compared with their definition, over random schedules.

Sequences are scheduled in chunks of any size, in any combination and order, share prefixes, including prefixes that the
same step computes, and lose drafted tokens again. With every schedule, each token must get the contribution of its
predecessor. On a GPU, or with Triton's interpreter (`TRITON_INTERPRET=1` with Triton installed), the kernels are
compared with the PyTorch versions.
"""

import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpus import DEVICE, import_kernels

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]  # vLLM warns when it is imported

DIM = 24


@pytest.fixture
def ops() -> Any:
    """The module, imported in the test because of the warnings of vLLM."""
    from yuan_grpc.model.lfa import ops

    return ops


@pytest.fixture
def kernels() -> Any:
    """The module; the test is skipped where its kernels cannot run."""
    return import_kernels("lfa.kernels")


Rows = list[tuple[torch.Tensor, torch.Tensor]]
"""Contributions of each token of a sequence, [2 * dim], and the expected result, [dim]."""


@dataclass
class Sequence:
    """Blocks of a sequence and the contribution of each of its tokens to the next one."""

    blocks: list[int]
    to_next: list[torch.Tensor] = field(default_factory=list)
    drafted: int = 0  # number of tokens at the end that may be rejected


@dataclass
class Step:
    """Input of a step and the expected result."""

    contributions: torch.Tensor
    """[rows, 2 * dim]"""
    metadata: Any
    expected: torch.Tensor
    """[rows without padding, dim]"""


class Batch:
    """Sequences with a cache, and a scheduler that forms steps from them."""

    def __init__(self, seed: int, drafts: int = 0, block_size: int = 8) -> None:
        from yuan_grpc.model.lfa.cache_layout import Slots, StateMetadata

        self.metadata = StateMetadata
        self.random = random.Random(seed)
        self.drafts = drafts
        self.block_size = block_size
        config: Any = SimpleNamespace(num_speculative_tokens=drafts)
        self.slots = Slots.from_config(config)
        self.free = list(range(1, 800))
        self.random.shuffle(self.free)
        self.cache = torch.full((800, self.slots.per_block, 3 * DIM), torch.nan, device=DEVICE)[..., DIM : 2 * DIM]
        self.sequences: list[Sequence] = []

    def add(self, other: Sequence | None = None) -> Sequence:
        """Add a sequence; it begins with all full blocks of another one, if given."""
        sequence = Sequence([])
        if other is not None:
            full_blocks = (len(other.to_next) - other.drafted) // self.block_size  # without tokens that may be rejected
            shared = full_blocks * self.block_size
            sequence = Sequence(other.blocks[:full_blocks], other.to_next[:shared])
        self.sequences.append(sequence)
        return sequence

    def add_random(self) -> Sequence:
        """Add a sequence that may begin with full blocks of another one."""
        has_prefix = self.sequences and self.random.random() < 0.6
        return self.add(self.random.choice(self.sequences) if has_prefix else None)

    def random_step(self) -> Step:
        """Return a step of old and new sequences in any order; new ones may share blocks that it computes."""
        if len(self.sequences) > 6:
            self.sequences.remove(self.random.choice(self.sequences))
        chosen = self.random.sample(self.sequences, self.random.randint(0, len(self.sequences)))
        scheduled = [(sequence, self.schedule(sequence, self.random_tokens())) for sequence in chosen]
        for _ in range(self.random.randint(0 if scheduled else 1, 2)):
            added = self.add_random()
            scheduled.append((added, self.schedule(added, self.random_tokens())))
        self.random.shuffle(scheduled)
        return self.step(scheduled, padding=self.random.randint(0, 3))

    def random_tokens(self) -> int:
        """Return the number of tokens to schedule for a sequence: one, one with drafts, or a chunk of a prompt."""
        return self.random.choice([1, 1, 1, self.drafts + 1, self.random.randint(1, 3 * self.block_size)])

    def schedule(self, sequence: Sequence, tokens: int) -> Rows:
        """Reject some drafts of a sequence, then append this number of tokens."""
        rejected = self.random.randint(0, sequence.drafted)
        del sequence.to_next[len(sequence.to_next) - rejected :]
        rows = []
        for _ in range(tokens):
            row = torch.randn(2 * DIM)
            from_previous = sequence.to_next[-1] if sequence.to_next else torch.zeros(DIM)
            sequence.to_next.append(row[:DIM])
            rows.append((row, from_previous + row[DIM:]))
        sequence.drafted = min(self.drafts, tokens - 1)
        while len(sequence.blocks) * self.block_size < len(sequence.to_next):
            sequence.blocks.append(self.free.pop())
        return rows

    def step(self, scheduled: list[tuple[Sequence, Rows]], padding: int = 0) -> Step:
        """Return the step with these sequences and their rows."""
        starts, rows = [0], []
        used = [block for sequence, _ in scheduled for block in sequence.blocks]
        table = torch.tensor([self.random.choices(used, k=64) for _ in scheduled])  # stale entries of longer sequences
        for index, (sequence, sequence_rows) in enumerate(scheduled):
            rows += sequence_rows
            starts.append(len(rows))
            table[index, : len(sequence.blocks)] = torch.tensor(sequence.blocks)
        lengths = [len(sequence.to_next) for sequence, _ in scheduled]
        metadata = self.metadata(
            torch.tensor(starts, dtype=torch.int32, device=DEVICE),
            torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
            table.int().to(DEVICE),
            self.block_size,
            self.slots,
        )
        contributions = torch.stack([row for row, _ in rows] + [torch.full((2 * DIM,), 7.0)] * padding).to(DEVICE)
        return Step(contributions, metadata, torch.stack([expected for _, expected in rows]).to(DEVICE))


def run_in_torch(
    ops: Any, batch: Batch, step: Step, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the plan of a step and the result without padding, and store states in the batch's cache."""
    plan = ops.new_plan(step.contributions)
    ops.fill_plan_in_torch(plan, step.metadata)
    out = torch.empty(len(step.contributions), DIM, device=DEVICE)
    ops.shift_add_in_torch(step.contributions, bias, out, plan, batch.cache)
    return plan, out[: len(step.expected)]


@pytest.mark.parametrize("drafts", [0, 1, 3])
@pytest.mark.parametrize("seed", range(8))
def test_each_token_gets_the_contribution_of_its_predecessor(ops: Any, seed: int, drafts: int) -> None:
    batch = Batch(seed, drafts)
    bias = torch.randn(DIM, device=DEVICE)
    for _ in range(25):
        step = batch.random_step()
        _, out = run_in_torch(ops, batch, step, bias)
        torch.testing.assert_close(out, step.expected + bias)


@pytest.mark.parametrize("drafts", [0, 1, 3])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_sequence_may_begin_with_blocks_that_the_same_step_computes(ops: Any, drafts: int, reverse: bool) -> None:
    batch = Batch(0, drafts)
    first = batch.add()
    scheduled = [(first, batch.schedule(first, 20))]
    second = batch.add(first)
    scheduled.append((second, batch.schedule(second, 12)))
    third = batch.add(second)
    scheduled.append((third, batch.schedule(third, 1)))
    assert second.blocks[:2] == third.blocks[:2] == first.blocks[:2]
    assert third.blocks[2] == second.blocks[2] != first.blocks[2]
    step = batch.step(scheduled[::-1] if reverse else scheduled)
    _, out = run_in_torch(ops, batch, step)
    torch.testing.assert_close(out, step.expected)


@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_a_sequence_may_begin_with_a_block_that_decoding_fills_in_the_same_step(ops: Any, drafts: int) -> None:
    batch = Batch(0, drafts)
    decoding = batch.add()
    run_in_torch(ops, batch, batch.step([(decoding, batch.schedule(decoding, 7))]))
    decoding.drafted = 0  # all drafts were accepted
    filling = batch.schedule(decoding, 1)  # with one slot, this row reads and writes the slot
    added = batch.add(decoding)
    assert len(added.to_next) == 8
    step = batch.step([(added, batch.schedule(added, 3)), (decoding, filling)])
    plan, out = run_in_torch(ops, batch, step)
    torch.testing.assert_close(out, step.expected)
    assert plan[1, 3] == decoding.blocks[0] * batch.slots.per_block + 7 % batch.slots.per_block
    afterwards = batch.step([(added, batch.schedule(added, 1)), (decoding, batch.schedule(decoding, 1))])
    torch.testing.assert_close(run_in_torch(ops, batch, afterwards)[1], afterwards.expected)


def test_the_state_of_an_earlier_step_is_read_from_its_slot(ops: Any) -> None:
    batch = Batch(0)
    first = batch.add()
    run_in_torch(ops, batch, batch.step([(first, batch.schedule(first, 20))]))
    second = batch.add(first)
    step = batch.step([(second, batch.schedule(second, 2)), (first, batch.schedule(first, 2))])
    plan, out = run_in_torch(ops, batch, step)
    assert plan[0].tolist() == [first.blocks[1], -2, first.blocks[2], -4]
    torch.testing.assert_close(out, step.expected)


@pytest.mark.parametrize("drafts", [0, 1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_kernels_match_the_pytorch_versions(
    ops: Any, kernels: Any, monkeypatch: pytest.MonkeyPatch, seed: int, drafts: int
) -> None:
    monkeypatch.setattr(kernels, "SEARCHED_SEQUENCES", 2)  # so that a few sequences need several iterations
    batch = Batch(seed, drafts)
    bias, weight = torch.randn(2, DIM, device=DEVICE).unbind()
    for _ in range(15):
        step = batch.random_step()
        plan, cache_before = ops.new_plan(step.contributions), batch.cache.clone()
        kernels.fill_plan(plan, step.metadata)
        reference, out = run_in_torch(ops, batch, step, bias)
        writes = reference[1] >= 0
        assert torch.equal(plan[:2], reference[:2])
        assert torch.equal(plan[2, writes], reference[2, writes])
        for norm in (False, True):
            cache, residual = cache_before.clone(), torch.randn(len(step.contributions), DIM, device=DEVICE)
            actual = torch.empty(len(step.contributions), DIM, device=DEVICE)
            added = kernels.Norm(residual, weight, 1e-6) if norm else None
            kernels.shift_add(step.contributions, bias, actual, plan, cache, added)
            summed = out + residual[: len(out)]
            normed = summed * torch.rsqrt(summed.square().mean(-1, keepdim=True) + 1e-6) * weight
            torch.testing.assert_close(actual[: len(out)], normed if norm else out)
            torch.testing.assert_close(cache, batch.cache, equal_nan=True)


def test_a_step_without_sequences_reads_and_stores_no_state(ops: Any) -> None:
    contributions = torch.randn(5, 2 * DIM, device=DEVICE)
    plan = torch.full((3, 5), ops.SEQUENCE_START, dtype=torch.int32, device=DEVICE)
    out = torch.empty(5, DIM, device=DEVICE)
    ops.shift_add_in_torch(contributions, None, out, plan, None)
    assert torch.equal(out, contributions[:, DIM:])


def test_a_plan_breaks_graphs_if_vllm_enables_breaks_after_the_import(
    ops: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken: list[tuple[Any, ...]] = []
    monkeypatch.setattr(ops, "eager_break_during_capture", lambda _: lambda *arguments: broken.append(arguments))
    plan = torch.empty(3, 5)
    ops.fill_plan(plan, "layer")
    assert broken == [(plan, "layer")]


def test_layers_share_compiled_code(ops: Any) -> None:
    """If the layer name were a constant of the graph, torch.compile would compile every layer separately."""
    from vllm.utils.torch_utils import _encode_layer_name

    compiled = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Any:
        compiled.append(graph.code)
        return lambda *_: ()

    for layer in ("layers.0", "layers.1"):
        name = _encode_layer_name(layer)

        @torch.compile(backend=backend, fullgraph=True)
        def filtered(contributions: torch.Tensor, out: torch.Tensor, plan: torch.Tensor, name: Any = name) -> None:
            torch.ops.vllm.yuan_shift_add(contributions, None, out, plan, name, 0)

        filtered(torch.zeros(1, 4), torch.zeros(1, 2), torch.zeros((3, 1), dtype=torch.int32))
    first, second = compiled
    assert "yuan_shift_add" in first
    assert first == second
