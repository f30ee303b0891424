"""How far a long task is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

LINE_SECONDS = 10.0


class Progress:
    """Progress of so many steps, with rate and time left; nothing is written but to the stream, standard error.

    Steps that had been done before, `begun`, count as done and not for the rate.
    """

    def __init__(
        self,
        what: str,
        total: int,
        begun: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what, self._total, self._done, self._begun = what, total, begun, begun
        self._stream = stream or sys.stderr
        self._clock = clock
        self._start = self._said = clock()
        self._extra: dict[str, int] = {}
        self._bar = _bar(what, total, begun, self._stream)

    def step(self, **counts: int) -> None:
        """Counts one step, and whatever else it had, such as tokens."""
        self._done += 1
        for name, count in counts.items():
            self._extra[name] = self._extra.get(name, 0) + count
        if self._bar is not None:
            self._bar.set_postfix_str(self._rates(), refresh=False)
            self._bar.update()
        elif self._clock() - self._said >= LINE_SECONDS:
            self._say()

    def close(self) -> None:
        """Says how far it came."""
        if self._bar is not None:
            self._bar.close()
        else:
            self._say()

    def _say(self) -> None:
        self._said = self._clock()
        elapsed = max(self._said - self._start, 1e-9)
        rate = (self._done - self._begun) / elapsed
        left = duration((self._total - self._done) / rate) if rate else "unknown"
        parts = [f"{self._what}: {self._done}/{self._total}", f"{rate:.1f}/s", self._rates(), f"ETA {left}"]
        print(", ".join(part for part in parts if part), file=self._stream, flush=True)

    def _rates(self) -> str:
        elapsed = max(self._clock() - self._start, 1e-9)
        return ", ".join(f"{count / elapsed:.0f} {name}/s" for name, count in self._extra.items())


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: `1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _bar(what: str, total: int, begun: int, stream: TextIO) -> Any:
    """A bar of tqdm's; None off a terminal, or where it is not installed."""
    if not stream.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(desc=what, total=total, initial=begun, file=stream, dynamic_ncols=True)
