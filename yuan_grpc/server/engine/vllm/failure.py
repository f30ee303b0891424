"""The cause of a failed start, in one line, from the exceptions of the engine's processes."""

import re
import signal
from collections.abc import Sequence

MAX_CAUSE = 500
"""Maximum length of a cause, in characters."""

WRAPPERS = ("WorkerProc initialization failed", "Engine core initialization failed")
"""Start of exceptions that only refer to another one."""

_WORKER_ERROR = re.compile(r"Worker failed with error '(.*)', please check", re.DOTALL)
_EXIT_STATUS = re.compile(r"Failed core proc\(s\): \{'\w+': -(\d+)")
_KILLED = re.compile(r"killed by (SIG\w+)")

SIGNALS = {
    "SIGKILL": "probably because the memory ran out: set a smaller --kv-cache-memory-bytes, or stop other programs",
    "SIGILL": "because this CPU lacks an instruction that vLLM or a compiled model uses",
    "SIGBUS": "probably because /dev/shm is full: enlarge it (docker run --shm-size=2g)",
}

TOO_SMALL = "the KV cache is too small for one request of the model's length: set a larger --kv-cache-memory-bytes"

ADVICE = (
    (r"larger than the available KV cache.* model length is (\d+)", rf"{TOO_SMALL}, or --max-model-len \1", ""),
    (r"larger than the available KV cache", TOO_SMALL, ""),
    (r"No available memory for the cache blocks", TOO_SMALL, ""),
    (r"can't allocate memory|Cannot allocate memory|std::bad_alloc|^MemoryError", "the memory ran out", "KV"),
    (r"CUDA out of memory|OutOfMemoryError", "the GPU's memory ran out", "GPU"),
    (r"No space left on device", "the disk or /dev/shm is full", "SPACE"),
    (r"Python\.h", "Python.h is missing: install python3-dev, or set --enforce-eager", ""),
    (r"InvalidCxxCompiler|No working C\+\+", "a C++ compiler is missing: install g++, or set --enforce-eager", ""),
    (r"Failed to find C compiler", "a C compiler is missing: install gcc", ""),
)
"""Patterns of causes, with the sentence to say instead, and the name of what helps unless the sentence has it."""

REMEDIES = {
    "KV": "set a smaller --kv-cache-memory-bytes or --max-model-len, or stop other programs",
    "GPU": "set a smaller --gpu-memory-utilization or --max-model-len, or more GPUs with --tensor-parallel-size",
    "SPACE": "free some space, or enlarge /dev/shm (docker run --shm-size=2g)",
}


def describe(error: BaseException, failures: Sequence[tuple[str, str]]) -> str:
    """Return the cause of a failed start.

    Args:
        error: the exception in the server's process.
        failures: type and message of the exceptions in the engine's processes, the first one first.
    """
    roots = [(kind, message) for kind, message in failures if not message.startswith(WRAPPERS)]
    kind, message = roots[0] if roots else failures[0] if failures else (type(error).__name__, str(error))
    if match := _WORKER_ERROR.search(message):
        message = match[1]
    if not roots and (match := _EXIT_STATUS.search(str(error))):
        message = f"the engine was killed by {signal.Signals(int(match[1])).name}"
    return _explain(kind, message)


def _explain(kind: str, message: str) -> str:
    if match := _KILLED.search(message):
        return f"{message}, {SIGNALS.get(match[1], 'see --log-level debug')}"
    for pattern, sentence, remedy in ADVICE:
        if match := re.search(pattern, f"{kind}: {message}", re.DOTALL):
            cause = match.expand(sentence)
            return f"{cause}: {REMEDIES[remedy]}" if remedy else cause
    line = " ".join(message.split()) or kind
    prefix = "" if kind in ("ValueError", "RuntimeError", "OSError", "Exception") else f"{kind}: "
    return f"{prefix}{line[:MAX_CAUSE]}" + ("…" if len(line) > MAX_CAUSE else "")
