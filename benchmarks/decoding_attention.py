"""Attention of decoding steps on a Hopper GPU, µs a layer: FlashAttention 3 and Triton's as vLLM calls them, and ours.

Each is timed in a CUDA graph of as many layers as fit, up to 24, with keys and values of their own, so that no cache
holds them once they are more than some 50 MB in all; the least of three times is taken. FlashAttention has the room for
parts of a sequence that Yuan gives it. `read` is how long the keys and values take at the speed of a copy.

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
from variants import Record, sizes_of
from vllm.utils.math_utils import cdiv

from yuan_grpc.model.vllm_config import MULTIPROCESSORS

BLOCK_SIZE = 16
LONGEST = 4096
LAYERS = 24
REPLAYS = 8
SEGMENTS = 16  # that vLLM's Triton attention cuts a sequence into where there are few

Attention = Callable[[int], None]
"""Computes one layer's."""


@dataclass
class Step:
    """One decoding step's queries, and what its sequences have in the caches of several layers."""

    q: torch.Tensor
    caches: list[torch.Tensor]
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    out: torch.Tensor

    @staticmethod
    def random(memory: torch.Tensor, heads: int, dim: int, batch: int, length: int) -> "Step":
        """Sequences in shuffled blocks of as many layers as the memory holds.

        Raises:
            ValueError: it holds fewer than two, or the sequences are longer than `LONGEST`.
        """
        blocks = cdiv(length, BLOCK_SIZE) * batch
        shape = (blocks, BLOCK_SIZE, heads, 2 * dim)
        layer = blocks * BLOCK_SIZE * heads * 2 * dim
        layers = min(LAYERS, memory.numel() // layer)
        if layers < 2 or length > LONGEST:
            raise ValueError(f"left out: {batch} sequences of {length} tokens, too many or too long")
        table = torch.zeros(batch, LONGEST // BLOCK_SIZE, dtype=torch.int32, device=memory.device)
        table[:, : blocks // batch] = torch.randperm(blocks, device=memory.device).view(batch, -1)
        q = torch.randn(batch, heads, dim, device=memory.device, dtype=memory.dtype)
        caches = [memory[n * layer : (n + 1) * layer].view(shape).transpose(1, 2) for n in range(layers)]
        lengths = torch.full((batch,), length, dtype=torch.int32, device=memory.device)
        return Step(q, caches, table, lengths, torch.empty_like(q))

    def attentions(self) -> Iterator[tuple[str, Attention]]:
        """All of them, as `vllm.v1.attention.backends` calls them; here and not above, for only GPUs have them."""
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
            "max_seqlen_k": LONGEST,
            "softmax_scale": dim**-0.5,
            "causal": True,
            "block_table": self.block_table,
        }
        splits = cdiv(MULTIPROCESSORS, heads)
        schedule = get_scheduler_metadata(
            batch_size=batch,
            max_seqlen_q=1,
            max_seqlen_k=LONGEST,
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

        def halves(layer: int) -> dict[str, torch.Tensor]:
            keys, values = self.caches[layer].transpose(1, 2).chunk(2, dim=-1)
            return {"k": keys, "v": values}

        def flash(layer: int) -> None:
            flash_attn_varlen_func(
                **shared,
                **halves(layer),
                window_size=[-1, -1],
                softcap=0.0,
                scheduler_metadata=schedule,
                fa_version=3,
                num_splits=splits,
            )

        def triton(layer: int) -> None:
            unified_attention(
                **shared,
                **halves(layer),
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
            decode_kernel.attend(self.q, self.caches[layer], self.block_table, self.seq_lens, self.out, dim**-0.5)

        yield from {"flash": flash, "triton": triton, "yuan": yuan}.items()


def microseconds(attention: Attention, layers: int) -> float:
    """The least of three times of a layer."""
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
    """Bytes that are read or written in a microsecond."""
    half = memory.numel() // 2

    def copy(_: int) -> None:
        memory[:half].copy_(memory[half : 2 * half])

    return 2 * half * memory.element_size() / microseconds(copy, 1)


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("attention.jsonl"), help="JSON lines (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--dim", type=int, default=64, help="of a head (default: %(default)s)")
    parser.add_argument("--batches", type=sizes_of, default="1,4,16,64,256", help="(default: %(default)s)")
    parser.add_argument("--lengths", type=sizes_of, default="256,1024,4096", help="tokens each (default: %(default)s)")
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
        took, answers = {}, []
        for name, attention in step.attentions():
            took[name] = microseconds(attention, len(step.caches))
            attention(0)
            answers.append(step.out.float())
        off = max(float((answer - answers[0]).abs().max()) for answer in answers)
        record.add(step="attention", batch=batch, tokens=length, read=read, difference=off, **took)
        cells = " | ".join(f"{value:.1f}" for value in (read, *took.values()))
        print(f"| {batch}×{length} | {cells} | {off:.1e} |", flush=True)


if __name__ == "__main__":
    main()
