"""Environment variables of the engine."""

import os

DEFAULTS = {
    "VLLM_NO_USAGE_STATS": "1",  # no telemetry unless the operator enables it
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # as the server's log; stdout is for generated text
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork of a process with gRPC threads can hang
}
"""Values of variables that vLLM reads at import, unless the operator sets them."""


def set_defaults() -> None:
    """Set the variables of `DEFAULTS` that are not set. Must be called before vLLM is imported."""
    for variable, value in DEFAULTS.items():
        os.environ.setdefault(variable, value)
