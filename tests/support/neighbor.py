"""A caller next to an expensive one: the times between the tokens of its stream, without and with the other."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from statistics import mean

from yuan_grpc.v1 import yuan_pb2 as pb
from yuan_grpc.v1 import yuan_pb2_grpc

REQUEST = pb.GenerateRequest(prompt="世界上最高的山是什么", max_tokens=1900, ignore_eos=True, temperature=1)
BASELINE_GAPS = 80
LARGEST_GAP = 0.25
MAX_SLOWDOWN = 3
"""Limits on the gaps with the expensive caller: in seconds, and in gaps of the same run without it."""


@dataclass
class Gaps:
    """Times between tokens in seconds, without and with the expensive caller."""

    baseline: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)

    @property
    def is_largest_acceptable(self) -> bool:
        """Whether no gap is much longer with the expensive caller."""
        return max(self.others) < max(LARGEST_GAP, MAX_SLOWDOWN * max(self.baseline))

    @property
    def is_mean_acceptable(self) -> bool:
        """Whether tokens are not much slower on average."""
        return mean(self.others) < MAX_SLOWDOWN * mean(self.baseline)

    def __str__(self) -> str:
        slowdown = mean(self.others) / mean(self.baseline)
        return f"largest gap {max(self.baseline):.3f} -> {max(self.others):.3f} s, mean x{slowdown:.2f}"


@asynccontextmanager
async def neighbor_gaps(stub: yuan_pb2_grpc.YuanServiceStub) -> AsyncIterator[Gaps]:
    """Run a stream. Enter the block after the baseline; leave it when there are as many gaps of the block."""
    gaps = Gaps()
    current, has_enough = gaps.baseline, asyncio.Event()

    async def stream() -> None:
        while True:
            last = None
            async for _ in stub.GenerateStream(REQUEST):
                now = time.monotonic()
                current.extend([now - last] if last else [])
                last = now
                if len(current) >= BASELINE_GAPS:
                    has_enough.set()

    task = asyncio.ensure_future(stream())
    try:
        await has_enough.wait()
        current, has_enough = gaps.others, asyncio.Event()
        yield gaps
        await has_enough.wait()
    finally:
        task.cancel()
        await asyncio.wait([task])
