"""The one op of Yuan's that reads per-step metadata: shift a batch's vectors by one token."""

from typing import TYPE_CHECKING, cast

import torch
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backends.short_conv_attn import ShortConvAttentionMetadata

if TYPE_CHECKING:
    from yuan_grpc.model.filtering import LocalizedFiltering

SHIFT_OP = "vllm::yuan_shift"


@eager_break_during_capture
def shift(current: torch.Tensor, previous: torch.Tensor, layer_name: str, state: int) -> None:
    """Writes to `previous` what `current` holds one token earlier in the same sequence, zero before a first token.

    The last token of each sequence is kept in the layer's cache for the next step, so that a sequence may come in any
    number of chunks, in any company. Opaque to torch.compile, and a place where CUDA graphs split.

    Args:
        current: [tokens, dim], the batch as the scheduler laid it out: one row for each decoding sequence, then the
            prompt chunks one after another, then rows of padding.
        previous: [tokens, dim], overwritten.
        layer_name: the layer whose cache holds the state.
        state: which of the layer's states (0: the filter's input, 1: its hidden half).
    """
    context = get_forward_context()
    metadata = context.attn_metadata
    if metadata is None:  # the memory-profiling run has no sequences
        previous.zero_()
        return
    assert isinstance(metadata, dict)
    layer = cast("LocalizedFiltering", context.no_compile_layers[layer_name])
    step = cast(ShortConvAttentionMetadata, metadata[layer_name])
    cache: torch.Tensor = layer.kv_cache[state].squeeze(1)  # [blocks, dim]
    decodes, prompts = step.num_decode_tokens, step.num_prefill_tokens
    previous[decodes + prompts :] = 0  # padding, which may share a scale with the rest where products are quantized
    if decodes:
        assert step.state_indices_tensor_d is not None
        blocks = step.state_indices_tensor_d[:decodes, 0]
        previous[:decodes] = cache[blocks]
        cache[blocks] = current[:decodes]
    if prompts:
        assert step.query_start_loc_p is not None
        assert step.state_indices_tensor_p is not None
        assert step.has_initial_states_p is not None
        chunk, shifted = current[decodes : decodes + prompts], previous[decodes : decodes + prompts]
        first, last = step.query_start_loc_p[:-1], step.query_start_loc_p[1:] - 1
        blocks = step.state_indices_tensor_p
        shifted[1:] = chunk[:-1]
        shifted[first] = torch.where(step.has_initial_states_p[:, None], cache[blocks], 0)
        cache[blocks] = chunk[last]


def _shift_shapes(current: torch.Tensor, previous: torch.Tensor, layer_name: str, state: int) -> None:
    """What torch.compile traces in place of `shift`: nothing but its in-place result."""


direct_register_custom_op(op_name="yuan_shift", op_func=shift, mutates_args=["previous"], fake_impl=_shift_shapes)
