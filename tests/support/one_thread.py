"""One thread for each process that computes: with small tensors, several threads only wait for each other.

The test session sets these variables before torch is imported, for itself and for the engines of most tests. Two test
processes then use two cores.
"""

import os

ONE_THREAD = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def set_one_thread() -> None:
    """Set the variables that are not set."""
    for name, value in ONE_THREAD.items():
        os.environ.setdefault(name, value)


def default_environment() -> dict[str, str]:
    """Return the environment without these variables, in which vLLM uses all cores."""
    return {name: value for name, value in os.environ.items() if name not in ONE_THREAD}
