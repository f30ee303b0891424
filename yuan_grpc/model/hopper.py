"""Properties of the Hopper GPUs that the model's configuration and kernels are tuned for."""

from vllm.platforms import current_platform

CAPABILITY_FAMILY = 90
"""Device capability family."""

MULTIPROCESSORS = 132
"""Largest number of multiprocessors of a Hopper GPU."""


def is_hopper() -> bool:
    """Return whether the engine runs on Hopper GPUs."""
    return current_platform.is_cuda() and current_platform.is_device_capability_family(CAPABILITY_FAMILY)
