"""Request the AMX tile registers in every vLLM process.

Why: vLLM's bfloat16 attention uses AMX on CPUs that have it, but no vLLM process asks Linux for the tile registers.
    The worker dies of an illegal instruction at the first request. With a single process the fault is hidden, because
    oneDNN happens to request the registers first.
How: `torch.cpu._init_amx` makes the request. It does nothing on machines without AMX.
Upstream: not reported yet; seen with vLLM 0.32.0. Text: docs/upstream/cpu-amx.md.
Remove when: vLLM requests the registers before its first AMX kernel runs.
"""

import torch


def apply() -> None:
    """Apply the patch in this process. Safe to call twice."""
    torch.cpu._init_amx()
