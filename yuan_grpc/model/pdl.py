"""Kernels that begin before the one ahead of them ends: programmatic dependent launch, from Hopper on.

What a kernel can do without the results of the one ahead is done meanwhile: its launch, and reading what is older, such
as weights or the step's plan. There is one rule, which Inductor's kernels (`triton.enable_pdl`) count on, and keep: to
wait first, and only then let the next one begin. So whatever the kernel before the one ahead wrote is there from the
start. A kernel that is launched in the ordinary way keeps the rule by itself, as it begins when all others have ended.
"""

from functools import cache

import torch
import triton
import triton.language as tl


@cache
def early_start(device: torch.device) -> dict[str, bool]:
    """Options of a launch, and what tells its kernel of them: whether it may begin early."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    early = nvidia and torch.cuda.get_device_capability(device)[0] >= 9
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


@triton.jit
def wait_ahead(EARLY: tl.constexpr) -> None:
    """Waits until the kernel ahead has ended, then lets the next one begin: once in every program of a kernel."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
