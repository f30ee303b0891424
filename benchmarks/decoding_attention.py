"""Attention of decoding steps on a Hopper GPU in µs per layer: FlashAttention 3, vLLM's Triton attention and ours.

Each is timed in a CUDA graph of as many layers as fit in memory, up to 24, with separate keys and values, so that the
GPU's caches do not hold them if their total exceeds about 50 MB. The shortest of three runs is reported. FlashAttention
gets as many splits of a sequence as in a Yuan model. `read` is the time to read the keys and values at the speed of a
copy.

    python benchmarks/decoding_attention.py --out attention.jsonl
    python benchmarks/decoding_attention.py --out attention.jsonl --heads 32 --dim 128 --batches 1,32 --lengths 256,2048
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from variants import Record, parse_sizes
from vllm.utils.math_utils import cdiv

from yuan_grpc.model.hopper import MULTIPROCESSORS

BLOCK_SIZE = 16
MAX_LENGTH = 4096
LAYERS = 24
REPLAYS = 8
SEGMENTS = 16  # segments per sequence in vLLM's Triton attention if there are few sequences

Attention = Callable[[int], None]
"""Computes the attention of a layer, given by its index."""


@dataclass
class Step:
    """Queries of a decoding step and its sequences in the caches of several layers."""

    q: torch.Tensor
    caches: list[torch.Tensor]
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    out: torch.Tensor

    @staticmethod
    def random(memory: torch.Tensor, heads: int, dim: int, batch: int, length: int) -> "Step":
        """Return a step with shuffled blocks, for as many layers as fit in the memory.

        Raises:
            ValueError: fewer than two layers fit, or the sequences are longer than `MAX_LENGTH`.
        """
        blocks = cdiv(length, BLOCK_SIZE) * batch
        shape = (blocks, BLOCK_SIZE, heads, 2 * dim)
        layer = blocks * BLOCK_SIZE * heads * 2 * dim
        layers = min(LAYERS, memory.numel() // layer)
        if layers < 2 or length > MAX_LENGTH:
            raise ValueError(f"skipped: {batch} sequences of {length} tokens are too many or too long")
        table = torch.zeros(batch, MAX_LENGTH // BLOCK_SIZE, dtype=torch.int32, device=memory.device)
        table[:, : blocks // batch] = torch.randperm(blocks, device=memory.device).view(batch, -1)
        q = torch.randn(batch, heads, dim, device=memory.device, dtype=memory.dtype)
        caches = [memory[n * layer : (n + 1) * layer].view(shape).transpose(1, 2) for n in range(layers)]
        lengths = torch.full((batch,), length, dtype=torch.int32, device=memory.device)
        return Step(q, caches, table, lengths, torch.empty_like(q))

    def attentions(self) -> Iterator[tuple[str, Attention]]:
        """Yield all implementations, called as in `vllm.v1.attention.backends`. The imports work on GPUs only."""
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_scheduler_metadata
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention

        from yuan_grpc.model.attention import decode_kernel

        batch, heads, dim = self.q.shape
        starts = torch.arange(batch + 1, dtype=torch.int32, device=self.q.device)
        shared: dict[str, Any] = {
            "q": self.q,
            "out": self.out,
            "cu_seqlens_q": starts,
            "max_seqlen_q": 1,
            "seqused_k": self.seq_lens,
            "max_seqlen_k": MAX_LENGTH,
            "softmax_scale": dim**-0.5,
            "causal": True,
            "block_table": self.block_table,
        }
        splits = cdiv(MULTIPROCESSORS, heads)
        schedule = get_scheduler_metadata(
            batch_size=batch,
            max_seqlen_q=1,
            max_seqlen_k=MAX_LENGTH,
            num_heads_q=heads,
            num_heads_kv=heads,
            headdim=dim,
            cache_seqlens=self.seq_lens,
            qkv_dtype=self.q.dtype,
            cu_seqlens_q=starts,
            page_size=BLOCK_SIZE,
            causal=True,
            window_size=(-1, -1),
            num_splits=splits,
        )
        segments = [self.q.new_empty((batch, heads, SEGMENTS, *last), dtype=torch.float32) for last in ((dim,), (), ())]

        def keys_and_values(layer: int) -> dict[str, torch.Tensor]:
            keys, values = self.caches[layer].transpose(1, 2).chunk(2, dim=-1)
            return {"k": keys, "v": values}

        def flash(layer: int) -> None:
            flash_attn_varlen_func(
                **shared,
                **keys_and_values(layer),
                window_size=[-1, -1],
                softcap=0.0,
                scheduler_metadata=schedule,
                fa_version=3,
                num_splits=splits,
            )

        def triton(layer: int) -> None:
            unified_attention(
                **shared,
                **keys_and_values(layer),
                window_size=(-1, -1),
                softcap=0,
                q_descale=None,
                k_descale=None,
                v_descale=None,
                seq_threshold_3D=128 // heads,
                num_par_softmax_segments=SEGMENTS,
                softmax_segm_output=segments[0],
                softmax_segm_max=segments[1],
                softmax_segm_expsum=segments[2],
            )

        def yuan(layer: int) -> None:
            decode_kernel.decode_attention(
                self.q, self.caches[layer], self.block_table, self.seq_lens, self.out, dim**-0.5
            )

        yield from {"flash": flash, "triton": triton, "yuan": yuan}.items()


def microseconds(attention: Attention, layers: int) -> float:
    """Return the shortest of three times of a layer."""
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        attention(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(layers):
            attention(layer)
    graph.replay()

    def once() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) * 1e3 / REPLAYS / layers

    return min(once() for _ in range(3))


def copy_speed(memory: torch.Tensor) -> float:
    """Return the number of bytes that a copy reads or writes per microsecond."""
    half = memory.numel() // 2

    def copy(_: int) -> None:
        memory[:half].copy_(memory[half : 2 * half])

    return 2 * half * memory.element_size() / microseconds(copy, 1)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("attention.jsonl"), help="JSON lines (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--dim", type=int, default=64, help="head dimension (default: %(default)s)")
    parser.add_argument("--batches", type=parse_sizes, default="1,4,16,64,256", help="(default: %(default)s)")
    parser.add_argument(
        "--lengths", type=parse_sizes, default="256,1024,4096", help="tokens per sequence (default: %(default)s)"
    )
    parser.add_argument("--memory", type=float, default=24, help="GiB of keys and values (default: %(default)s)")
    arguments = parser.parse_args()
    memory = torch.empty(int(arguments.memory * 2**29), dtype=torch.bfloat16, device="cuda").normal_()
    speed = copy_speed(memory)
    record = Record(arguments.out, device=torch.cuda.get_device_name(), heads=arguments.heads, dim=arguments.dim)
    print(f"| batch × tokens | read at {speed / 1e6:.2f} TB/s | flash | triton | yuan | largest difference |")
    print("| --- | --- | --- | --- | --- | --- |")
    for length, batch in product(arguments.lengths, arguments.batches):
        try:
            step = Step.random(memory, arguments.heads, arguments.dim, batch, length)
        except ValueError as error:
            print(error, file=sys.stderr)
            continue
        read = batch * length * arguments.heads * 2 * arguments.dim * memory.element_size() / speed
        times, outputs = {}, []
        for name, attention in step.attentions():
            times[name] = microseconds(attention, len(step.caches))
            attention(0)
            outputs.append(step.out.float())
        difference = max(float((output - outputs[0]).abs().max()) for output in outputs)
        record.add(step="attention", batch=batch, tokens=length, read=read, difference=difference, **times)
        cells = " | ".join(f"{value:.1f}" for value in (read, *times.values()))
        print(f"| {batch}×{length} | {cells} | {difference:.1e} |", flush=True)


if __name__ == "__main__":
    main()
