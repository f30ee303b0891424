"""Ctrl-C, while a command waits for answers."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from collections.abc import Coroutine
from contextlib import ExitStack
from types import TracebackType
from typing import Any, TypeVar

from yuan_grpc.cli.common.terminal import silenced

T = TypeVar("T")


class Interruptible:
    """An event loop in which Ctrl-C comes where something is awaited, and nowhere else.

    KeyboardInterrupt as Python has it comes between any two steps: behind a line that is written and before it is known
    to be, or with a lock of gRPC's taken that nobody gives back.

    While stdout's reader is paused the work stands in a write, and is not told. A second Ctrl-C then lets the write,
    and what comes after it until the work has ended, go nowhere.
    """

    def __enter__(self) -> Interruptible:
        self._loop = asyncio.new_event_loop()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What the work returns.

        Raises:
            KeyboardInterrupt: it was cancelled by Ctrl-C, and has ended.
        """
        task = self._loop.create_task(work)
        is_main = threading.current_thread() is threading.main_thread()  # no other is told of signals
        untold, silence = list[int](), ExitStack()

        def cancel() -> None:
            untold.clear()
            task.cancel()

        def interrupt(number: int, _: object) -> None:
            if untold and sys.stdout is not None:
                silence.enter_context(silenced(sys.stdout))
            untold.append(number)
            self._loop.call_soon_threadsafe(cancel)

        previous = signal.getsignal(signal.SIGINT)
        if is_main:  # and not by the loop, which would come to it after the write
            signal.signal(signal.SIGINT, interrupt)
        try:
            return self._loop.run_until_complete(task)
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        finally:
            if is_main:
                signal.signal(signal.SIGINT, previous)
            silence.close()
