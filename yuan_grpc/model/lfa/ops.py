"""Yuan's own operations: adding to each token what a convolution made of the token before, and a quick product.

A step's batch is a sequence of rows: a token of each decoding sequence, chunks of prompts, then padding. `plan` finds
out, once a step, where each row's predecessor is and which states must be kept; `shift_add` follows the plan in every
layer. They are opaque to torch.compile. Only `plan` reads what changes from step to step, so only there are CUDA graphs
split. Both have a Triton kernel (`kernels`) and, where there is none, a PyTorch version, here. `product` is for GPUs.
"""

from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn.functional import linear
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.utils import default_unquantized_gemm
from vllm.utils.torch_utils import LayerNameType, _resolve_layer_name, direct_register_custom_op

from yuan_grpc.model.lfa.cache import IN_BATCH, SEQUENCE_START, StateMetadata

if TYPE_CHECKING:
    from yuan_grpc.model.lfa.layer import LocalizedFiltering

PLAN_OP = "vllm::yuan_plan"


def new_plan(tokens: torch.Tensor) -> torch.Tensor:
    """Room for a plan of so many rows, [3, tokens] int32: read slot, write slot, written row."""
    return torch.empty((3, tokens.shape[0]), dtype=torch.int32, device=tokens.device)


def plan(plan: torch.Tensor, layer_name: LayerNameType) -> None:
    """Writes, for each row of this step's batch, where its predecessor's state is and what is to be kept of it.

    Args:
        plan: [3, tokens], overwritten. First row: the slot to read, `SEQUENCE_START`, or `IN_BATCH` less the row where
            the predecessor is. That is the row before, or, for a sequence that begins with blocks which another one
            fills in this step, a row of the other's. Second: the slot to write, or -1. Third: the row whose state goes
            there. That is the row itself, unless the slot is the one that its sequence begins this step with: then the
            sequence's first row, which reads it, is also the one to write it, in that order.
        layer_name: any layer with LFA: they all have the same sequences.
    """
    # Not as a decorator, which would look once and too early: vLLM may ask for breaks while it reads its configuration.
    eager_break_during_capture(_plan)(plan, _resolve_layer_name(layer_name))


def _plan(plan: torch.Tensor, layer_name: str) -> None:
    metadata = get_forward_context().attn_metadata
    if metadata is None:  # the memory-profiling run has no sequences
        plan.fill_(SEQUENCE_START)
        return
    assert isinstance(metadata, dict)
    step = cast(StateMetadata, metadata[layer_name])
    if plan.is_cuda:
        from yuan_grpc.model.lfa import kernels

        kernels.plan(plan, step)
    else:
        plan_in_torch(plan, step)


def plan_in_torch(plan: torch.Tensor, step: StateMetadata) -> None:
    """`plan`, without Triton."""
    read, write, source = plan.long().unbind()
    starts, block_size, slots = step.query_start_loc.long(), step.block_size, step.slots
    rows = torch.arange(plan.shape[1], device=plan.device)
    sequence = torch.searchsorted(starts[:-1], rows, right=True) - 1
    first, last = starts[sequence], starts[sequence + 1] - 1
    position = step.seq_lens.long()[sequence] - 1 - last + rows
    present = (rows <= last) & (position >= 0)  # the rest is padding
    position.clamp_(min=0)

    def slot(at: torch.Tensor) -> torch.Tensor:
        """The slot of a position, in its block."""
        block = step.block_table[sequence, (at // block_size).clamp(min=0)].long()
        return block * slots.in_block + at % block_size % slots.in_block

    before = position - (rows - first) - 1  # the sequence's last position before this step
    begins = slot(before)  # the slot that its first row reads
    begun = position > rows - first  # and whether it reads one
    kept = present & ((position % block_size == block_size - 1) | (last - rows < slots.kept))
    own = slot(position)
    handed = kept & begun & (own == begins)
    source.copy_(rows).index_copy_(0, first[handed], rows[handed])
    write.copy_(torch.where(kept & ~handed, own, -1)).index_copy_(0, first[handed], own[handed])
    torch.sub(IN_BATCH + 1, rows, out=read)  # the row before
    at_first = rows == first
    read[at_first & begun] = begins[at_first & begun]
    read[(at_first & ~begun) | ~present] = SEQUENCE_START
    (behind_block,) = torch.where(at_first & begun & present & (position % block_size == 0))  # only those may share one
    if len(behind_block):
        makers = _makers(step, sequence[behind_block], before[behind_block])
        read[behind_block] = torch.where(makers >= 0, IN_BATCH - makers, read[behind_block])
    plan.copy_(torch.stack((read, write, source)))


def _makers(step: StateMetadata, sequence: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Which rows of this step compute these positions of these sequences, in blocks that are another's too; or -1.

    A shared block is part of a shared prefix, so it is at the same place in both tables.
    """
    starts, ends, block = step.query_start_loc.long(), step.seq_lens.long(), position // step.block_size
    row = starts[1:] - ends + position[:, None]  # [positions, sequences]: where it is, if it is here
    computes = (row >= starts[:-1]) & (row < starts[1:])
    table = step.block_table[: len(ends)]
    shares = table[sequence, block][:, None] == table[:, block].T
    return torch.where(computes & shares, row, -1).amax(dim=1)


def shift_add(
    parts: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    plan: torch.Tensor,
    layer_name: LayerNameType,
    state: int,
) -> None:
    """Writes to `out` each token's own part plus the part that the token before made for it, and keeps states.

    Args:
        parts: [tokens, 2 * dim]: what a token makes for the next one, then what it makes for itself.
        bias: [dim], or None.
        out: [tokens, dim], overwritten; summed in float32 and rounded once.
        plan: the step's, of `plan`.
        layer_name: the layer whose cache holds the state.
        state: which of the layer's convolutions this is, 0 or 1.
    """
    cache = _cache(layer_name, state)
    if parts.is_cuda:
        from yuan_grpc.model.lfa import kernels

        kernels.shift_add(parts, bias, out, plan, cache)
    else:
        shift_add_in_torch(parts, bias, out, plan, cache)


def shift_add_in_torch(
    parts: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, plan: torch.Tensor, cache: torch.Tensor | None
) -> None:
    """`shift_add`, without Triton; `cache` is [blocks, slots, dim] or None."""
    for_next, own = parts.float().chunk(2, dim=-1)
    read, write, source = plan.long().unbind()
    previous = torch.zeros_like(own)
    (inner,) = torch.where(read <= IN_BATCH)
    previous[inner] = for_next[IN_BATCH - read[inner]]
    if cache is not None:
        (resumed,) = torch.where(read >= 0)
        previous[resumed] = cache[_place(read[resumed], cache)].float()
        (kept,) = torch.where(write >= 0)
        cache[_place(write[kept], cache)] = for_next[source[kept]].to(cache.dtype)
    previous += own
    if bias is not None:
        previous += bias.float()
    out.copy_(previous)


def _place(slots: torch.Tensor, cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Block and slot in the block, for a cache that other vectors lie between."""
    return slots // cache.shape[1], slots % cache.shape[1]


def shift_add_norm(
    parts: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    out: torch.Tensor,
    plan: torch.Tensor,
    layer_name: LayerNameType,
    state: int,
) -> None:
    """`shift_add`, plus a residual, RMS-normalized: [tokens, dim] in one kernel, on GPUs.

    Args:
        residual: [tokens, dim].
        weight: [dim], the norm's.
        epsilon: the norm's.
    """
    from yuan_grpc.model.lfa import kernels

    cache = _cache(layer_name, state)
    kernels.shift_add(parts, bias, out, plan, cache, norm=kernels.Norm(residual, weight, epsilon))


def _cache(layer_name: LayerNameType, state: int) -> torch.Tensor | None:
    """[blocks, slots, dim] of one layer's state; None while vLLM measures what memory is left for caches."""
    layer = cast("LocalizedFiltering", get_forward_context().no_compile_layers[_resolve_layer_name(layer_name)])
    return layer.kv_cache[state] if layer.kv_cache else None


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x Wᵀ, [tokens, rows]: with few tokens at the speed of reading the weight. On GPUs."""
    from yuan_grpc.model import skinny_gemm

    if skinny_gemm.serves(x.shape[0], weight):
        return skinny_gemm.linear(x, weight)
    return torch.mm(x, weight.t())  # `linear` takes the host twice as long to say the same


def _product_shapes(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def multiply_with_product(model: nn.Module) -> None:
    """Has the linear layers of a model use `product` where vLLM would leave the choice of a kernel to PyTorch."""

    def multiply(_: nn.Module, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if bias is not None:
            return linear(x, weight, bias)
        result: torch.Tensor = torch.ops.vllm.yuan_product(x, weight)
        return result

    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, UnquantizedLinearMethod) and method._gemm_impl is default_unquantized_gemm:
            method._gemm_impl = multiply


def _nothing(*_: object, **__: object) -> None:
    """What torch.compile traces in place of an operation: nothing but its in-place result."""


direct_register_custom_op("yuan_product", product, fake_impl=_product_shapes)
direct_register_custom_op("yuan_plan", plan, mutates_args=["plan"], fake_impl=_nothing)
direct_register_custom_op("yuan_shift_add", shift_add, mutates_args=["out"], fake_impl=_nothing)
direct_register_custom_op("yuan_shift_add_norm", shift_add_norm, mutates_args=["out"], fake_impl=_nothing)
