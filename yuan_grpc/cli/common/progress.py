"""A progress bar on stderr, for what lasts."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from yuan_grpc.cli.common.terminal import is_terminal

DELAY_SECONDS = 1.0
PERIOD_SECONDS = 0.25
_NO_TOTAL = "{desc} {elapsed}"


class Progress:
    """A bar that appears after a second, where stderr is a terminal and tqdm is installed; without, nothing.

    It moves by a thread of its own, so that its clock runs while nothing else happens.

    Args:
        description: what is being done.
        total: how many units there are; None for a clock alone.
        unit: what is counted.
    """

    def __init__(self, description: str, total: int | None = None, unit: str = "") -> None:
        self._description, self._total, self._unit = description, total, unit
        self._done = 0
        self._bar: Any = None
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Progress:
        tqdm = _tqdm() if is_terminal(sys.stderr) else None
        if tqdm:
            self._thread = threading.Thread(target=self._move, args=(tqdm, time.time()), daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end()

    def advance(self) -> None:
        """One more unit is done."""
        self._done += 1

    def end(self) -> None:
        """Takes the bar away; a second time nothing happens."""
        self._ended.set()
        if self._thread:
            self._thread.join()
            self._thread = None

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Keeps the bar out of the way of what is printed inside."""
        with self._lock:
            if self._bar is not None:
                self._bar.clear()
            yield

    def _move(self, tqdm: Any, began: float) -> None:
        pause = DELAY_SECONDS
        while not self._ended.wait(pause):
            with self._lock:
                if self._bar is None:
                    self._bar = self._made(tqdm, began)
                self._bar.n = self._done
                self._bar.refresh()
            pause = PERIOD_SECONDS
        if self._bar is not None:
            self._bar.close()

    def _made(self, tqdm: Any, began: float) -> Any:
        shape = None if self._total is not None else _NO_TOTAL
        bar = tqdm(
            total=self._total,
            desc=self._description,
            unit=self._unit,
            leave=False,
            dynamic_ncols=True,
            bar_format=shape,
        )
        bar.start_t = began  # or its rate would leave the first second out
        return bar


def _tqdm() -> Any:
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return None
    tqdm.monitor_interval = 0  # a thread that we have no use for
    return tqdm
