"""Programmatic dependent launch (PDL): kernels that start before the previous kernel ends, from Hopper on.

Before it waits, a kernel does everything that does not depend on the previous kernel: its launch, and loads of older
data such as weights or the step's plan. Every kernel must first wait for the previous one and only then allow the next
one to start. Inductor's kernels (`triton.enable_pdl`) follow this rule and rely on it. The results of all kernels
before the previous one are therefore available from the start. A kernel launched without PDL follows the rule
automatically, because it starts after all earlier kernels have ended.
"""

from functools import cache

import torch
import triton
import triton.language as tl


@cache
def pdl_options(device: torch.device) -> dict[str, bool]:
    """Return the launch options that enable or disable PDL, including the kernel's constant `USE_PDL`."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    use_pdl = is_nvidia and torch.cuda.get_device_capability(device)[0] >= 9
    return {"USE_PDL": True, "launch_pdl": True} if use_pdl else {"USE_PDL": False}


@triton.jit
def wait_for_previous_kernel(USE_PDL: tl.constexpr) -> None:
    """Wait until the previous kernel has ended, then allow the next one to start; call once in every program."""
    if USE_PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
