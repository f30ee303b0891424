"""Progress of long tasks on stderr."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TextIO

from yuan_grpc.cli.common.terminal import Notes, is_terminal
from yuan_grpc.humaneval.formatting import format_duration

DELAY_SECONDS = 1.0
"""Delay before a bar appears."""
PERIOD_SECONDS = 0.25
"""Interval between updates of a bar."""
LINE_SECONDS = 10.0
"""Interval between lines."""
_CLOCK_FORMAT = "{desc} {elapsed}"


class Progress:
    """Progress of a task: a bar if stderr is a terminal and tqdm is installed, otherwise nothing or lines.

    A thread updates the bar, so that its clock runs while nothing else happens.

    Args:
        description: name of the task.
        total: number of units, or None for a clock without a bar.
        unit: name of a unit in the bar's rate.
        initial: number of units completed before; they do not count for the rate.
        persistent: whether the bar appears at once and stays at the end. Where no bar is shown, a line with rates and
            the remaining time is then printed every ten seconds and at the end.
        stream: the stream instead of stderr.
        clock: source of the time for lines and rates, in seconds.
    """

    def __init__(
        self,
        description: str,
        total: int | None = None,
        unit: str = "it",
        *,
        initial: int = 0,
        persistent: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._description, self._total, self._unit, self._initial = description, total, unit, initial
        self._persistent, self._stream, self._clock = persistent, stream or sys.stderr, clock
        self._done = initial
        self._counts: Counter[str] = Counter()
        self._started = self._last_line = 0.0
        self._bar: Any = None
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Progress:
        self._started = self._last_line = self._clock()
        tqdm = _import_tqdm() if is_terminal(self._stream) and not Notes.quiet else None
        if tqdm:
            self._thread = threading.Thread(target=self._update_bar, args=(tqdm, time.time()), daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end()

    def advance(self, **counts: int) -> None:
        """Count one completed unit, and quantities whose rates are shown, such as `tokens`."""
        self._done += 1
        self._counts.update(counts)
        if self._prints_lines and self._clock() - self._last_line >= LINE_SECONDS:
            self._print_line()

    def end(self) -> None:
        """Remove or complete the bar, or print the last line. Later calls have no effect."""
        if self._ended.is_set():
            return
        if self._prints_lines:
            self._print_line()
        self._ended.set()
        if self._thread:
            self._thread.join()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Hide the bar while the block prints."""
        with self._lock:
            if self._bar is not None:
                self._bar.clear()
            yield

    @property
    def _prints_lines(self) -> bool:
        return self._persistent and self._thread is None and self._stream is not None and not Notes.quiet

    def _print_line(self) -> None:
        self._last_line = self._clock()
        elapsed = max(self._last_line - self._started, 1e-9)
        rate = (self._done - self._initial) / elapsed
        remaining = format_duration(((self._total or 0) - self._done) / rate) if rate else "unknown"
        parts = [f"{self._description}: {self._done}/{self._total}", f"{rate:.1f}/s", self._format_rates()]
        print(", ".join(part for part in (*parts, f"ETA {remaining}") if part), file=self._stream, flush=True)

    def _format_rates(self) -> str:
        elapsed = max(self._clock() - self._started, 1e-9)
        counts = list(self._counts.items())  # a copy: the bar's thread calls this while counts are added
        return ", ".join(f"{count / elapsed:.0f} {name}/s" for name, count in counts)

    def _update_bar(self, tqdm: Any, started: float) -> None:
        pause = 0.0 if self._persistent else DELAY_SECONDS
        while not self._ended.wait(pause):
            self._refresh_bar(tqdm, started)
            pause = PERIOD_SECONDS
        if self._persistent:
            self._refresh_bar(tqdm, started)
        if self._bar is not None:
            self._bar.close()

    def _refresh_bar(self, tqdm: Any, started: float) -> None:
        with self._lock:
            if self._bar is None:
                self._bar = self._create_bar(tqdm, started)
            self._bar.n = self._done
            self._bar.set_postfix_str(self._format_rates(), refresh=False)
            self._bar.refresh()

    def _create_bar(self, tqdm: Any, started: float) -> Any:
        bar = tqdm(
            total=self._total,
            initial=self._initial,
            desc=self._description,
            unit=self._unit,
            file=self._stream,
            leave=self._persistent,
            dynamic_ncols=True,
            bar_format=None if self._total is not None else _CLOCK_FORMAT,
        )
        bar.start_t = started  # otherwise the rate ignores the first second
        return bar


def _import_tqdm() -> Any:
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return None
    tqdm.monitor_interval = 0  # disables tqdm's monitor thread
    return tqdm
