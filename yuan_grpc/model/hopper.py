"""Properties of the Hopper GPUs that the model's configuration and kernels are tuned for."""

HOPPER = 90
"""Device capability family."""

MULTIPROCESSORS = 132
"""Largest number of multiprocessors of a Hopper GPU."""
