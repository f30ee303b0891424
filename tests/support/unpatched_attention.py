"""Computes vLLM's bfloat16 attention on a CPU in a process without the plugin, and prints the instruction set.

python unpatched_attention.py [--patched]
"""

import sys

import torch
from vllm import _custom_ops as ops
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from yuan_grpc.model.patches import cpu_amx

TOKENS, HEADS, HEAD_DIM, BLOCK, BLOCKS = 4, 2, 64, 32, 2
BFLOAT16 = torch.bfloat16


def main() -> None:
    """Compute the attention of one prompt."""
    if "--patched" in sys.argv:
        cpu_amx.apply()
    current_platform.import_kernels()
    isa = _get_attn_isa(BFLOAT16, BLOCK, HEAD_DIM)
    print(isa, flush=True)
    query, key, value = torch.ones(3, TOKENS, HEADS, HEAD_DIM, dtype=BFLOAT16).unbind()
    key_cache, value_cache = torch.zeros(2, BLOCKS, HEADS, BLOCK, HEAD_DIM, dtype=BFLOAT16).unbind()
    starts, lengths = torch.tensor([0, TOKENS], dtype=torch.int32), torch.tensor([TOKENS], dtype=torch.int32)
    blocks = torch.zeros(1, 1, dtype=torch.int32)
    ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, torch.arange(TOKENS), isa)
    plan = ops.cpu_attn_get_scheduler_metadata(
        1, HEADS, HEADS, HEAD_DIM, lengths, BFLOAT16, starts, True, -1, isa, True
    )
    output = torch.empty_like(query)
    ops.cpu_attention_with_kv_cache(
        query, key_cache, value_cache, output, starts, lengths, 1.0, True, None, -1, blocks, 0.0, plan, None
    )
    assert output.eq(1).all()


if __name__ == "__main__":
    main()
