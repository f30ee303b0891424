"""The environment of an engine."""

import os

DEFAULTS = {
    "VLLM_NO_USAGE_STATS": "1",  # no telemetry unless the operator turns it on
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # with our own log; stdout is for answers
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork of a process with gRPC's threads can hang
}
"""Variables vLLM reads when it is imported, where the operator has not set them."""


def set_defaults() -> None:
    """Fills in `DEFAULTS`. For before vLLM is imported."""
    for variable, value in DEFAULTS.items():
        os.environ.setdefault(variable, value)
