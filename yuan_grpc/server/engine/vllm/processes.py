"""The end of the engine's processes, whatever state they are in.

vLLM waits for the end of its engine process, but not of that process's workers. A worker that hangs or is suspended
does not notice that its parent has ended.
"""

import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_PARENT, _START_TIME = 1, 19
"""Indexes in the fields of `/proc/PID/stat` after the name of the program."""


class ProcessTree:
    """The processes of an engine that has started.

    Args:
        roots: the processes that the server has started.
    """

    def __init__(self, roots: Iterable[int]) -> None:
        self._start_times = _with_descendants(roots)

    def resume(self) -> None:
        """Resume the processes that are suspended, so that they receive signals."""
        self._send(signal.SIGCONT)

    def kill(self) -> None:
        """Kill the processes that are still running."""
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        for pid, start_time in self._start_times.items():
            if (fields := _stat(pid)) and fields[_START_TIME] == start_time:
                with suppress(OSError):
                    os.kill(pid, number)


def _with_descendants(roots: Iterable[int]) -> dict[int, str]:
    """Return the start time of each root and each of its descendants."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    stats = {pid: fields for pid in pids if (fields := _stat(pid))}
    found, start_times = list(roots), dict[int, str]()
    while found:
        if (pid := found.pop()) in stats and pid not in start_times:
            start_times[pid] = stats[pid][_START_TIME]
            found += [child for child, fields in stats.items() if fields[_PARENT] == str(pid)]
    return start_times


def _stat(pid: int) -> list[str]:
    """Return the fields of a process after its name; an empty list if it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return []
