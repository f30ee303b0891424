"""The log of the engine's processes: progress of a start, warnings that matter, and the failures that end a start.

vLLM loads `engine_log.json` in each of its processes, and with it this module.
"""

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from yuan_grpc.server.log_format import create_formatter

CONFIG_FILE = str(Path(__file__).with_suffix(".json"))

LEVEL_VARIABLE = "YUAN_GRPC_LOG_LEVEL"
FORMAT_VARIABLE = "YUAN_GRPC_LOG_FORMAT"
FAILURES_VARIABLE = "YUAN_GRPC_ENGINE_FAILURES"
"""Names the file that the engine's processes write failures to. It exists while they start."""

PROGRESS = {
    "Starting to load model": "loading weights",
    "Warming up model for the compilation": "compiling the model; the next start is faster",
    "%sStarting torch.compile": "compiling the model; the next start is faster",
    "Profiling CUDA graph memory": "capturing CUDA graphs",
    "%s KV cache size": "{message}",
    "Graph capturing finished": "captured CUDA graphs",
}
"""Start of messages about steps that may take long, with the line that is logged instead."""

OWN_LOGGER = "vllm.yuan_grpc"
"""Parent of the loggers of `yuan_grpc.model`, whose messages are logged unchanged."""

HARMLESS = (
    "Using a slow tokenizer",
    "Enforce eager set",
    "Inductor compilation was disabled by user settings",
    "Triton is not installed",
    "Reset SSM cache type to float32",
    "Model Runner V2 requires Triton",
    "%s is not found in LD_PRELOAD",
    "CPU backend doesn't allow to use `torch.set_num_threads`",
    "Selected CPU core number",
    "AsyncLLM created with api_server_count more than 1",  # vLLM does not log statistics
    "Found duplicate keys",  # an option replaces a default of the demo
)
"""Start of warnings that call for no action: they describe what was chosen, or do not apply to Yuan."""

HARMLESS_WARNINGS = (r"`torch.distributed.reduce_op` is deprecated",)
"""Patterns of harmless warnings of Python in vLLM's code."""


@cache
def hide_harmless_warnings() -> None:
    """Hide the harmless messages that do not pass through vLLM's loggers, once, unless the level is debug."""
    if os.environ.get(LEVEL_VARIABLE) == "debug":
        return
    for pattern in HARMLESS_WARNINGS:
        warnings.filterwarnings("ignore", pattern)
    logging.getLogger("torch._library.triton").addFilter(lambda record: False)  # it notes that Triton is missing
    # The tracker of shared memory, which is started with these options, removes the leftovers of a failed engine.
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")


def __getattr__(name: str) -> str:
    """Return `VLLM_LEVEL`, the level of the `vllm` loggers, when `engine_log.json` is loaded. Progress has INFO."""
    if name == "VLLM_LEVEL":
        return os.environ.get("VLLM_LOGGING_LEVEL", "INFO").upper()
    raise AttributeError(name)


class EngineLogHandler(logging.Handler):
    """Writes vLLM's records to stderr, in the format of the server's log, and failures of a start to a file.

    Unless `--log-level` is debug or `VLLM_LOGGING_LEVEL` is set, these are progress and warnings.
    """

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(create_formatter(os.environ.get(FORMAT_VARIABLE, "text")))
        self._level = os.environ.get(LEVEL_VARIABLE, "warning").upper()
        self._shows_all = self._level == "DEBUG" or "VLLM_LOGGING_LEVEL" in os.environ
        self._last_progress = ""
        hide_harmless_warnings()

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record, if it is of interest."""
        is_start_failure = record.exc_info is not None and record_failure(record)
        if self._shows_all or (not is_start_failure and self._is_shown(record)):
            with suppress(OSError, ValueError):  # stderr may be closed or full
                sys.stderr.write(self.format(record) + "\n")

    def _is_shown(self, record: logging.LogRecord) -> bool:
        """Return whether a record is shown at the usual levels; replace the text of progress."""
        message = str(record.msg)
        if record.levelno >= logging.WARNING:
            return record.levelno >= getattr(logging, self._level) and not message.startswith(HARMLESS)
        if self._level != "INFO" or record.levelno < logging.INFO or not _is_first_rank(record):
            return False
        if record.name.startswith(OWN_LOGGER):
            return True
        text = next((text for start, text in PROGRESS.items() if message.startswith(start)), "")
        if not text or (progress := text.format(message=record.getMessage())) == self._last_progress:
            return False
        self._last_progress, record.msg, record.args = progress, progress, ()
        return True


def _is_first_rank(record: logging.LogRecord) -> bool:
    """Return whether a record comes from the first of several workers."""
    ranks = str(getattr(record, "vllm_process_name", "")).split("_")[1:]
    return all(rank.endswith("0") for rank in ranks)


def record_failure(record: logging.LogRecord) -> bool:
    """Write the exception of a record to the file of failures; return whether the engine is starting."""
    name = os.environ.get(FAILURES_VARIABLE, "")
    error = record.exc_info[1] if record.exc_info else None
    if error is None or not os.path.exists(name):
        return False
    line = json.dumps({"type": type(error).__name__, "message": str(error)})
    with suppress(OSError):
        descriptor = os.open(name, os.O_WRONLY | os.O_APPEND)
        os.write(descriptor, f"{line}\n".encode())
        os.close(descriptor)
    return True


@contextmanager
def failure_file(folder: str) -> Iterator[Path]:
    """Collect the failures of the processes that start in the block, in a file of a folder."""
    file = Path(folder, "failures")
    file.touch(mode=0o600)
    os.environ[FAILURES_VARIABLE] = str(file)
    try:
        yield file
    finally:
        file.unlink(missing_ok=True)
        del os.environ[FAILURES_VARIABLE]


def read_failures(file: Path) -> list[tuple[str, str]]:
    """Return type and message of each failure, the first one first."""
    failures = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    return [(failure["type"], failure["message"]) for failure in failures]
