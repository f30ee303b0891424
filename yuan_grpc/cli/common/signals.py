"""Ctrl-C handling while a command waits for a server."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from collections.abc import Coroutine
from contextlib import ExitStack
from types import TracebackType
from typing import Any, TypeVar

from yuan_grpc.cli.common.terminal import discard_output

T = TypeVar("T")


class InterruptibleLoop:
    """Event loop in which Ctrl-C cancels the running coroutine at an await, and nowhere else.

    Python's own KeyboardInterrupt can arrive between any two instructions: after a line is written and before the
    program records it, or while gRPC holds a lock.

    If the reader of stdout is paused, the coroutine blocks in a write and does not see the cancellation. A second
    Ctrl-C then discards that write and all later output of the coroutine.
    """

    def __enter__(self) -> InterruptibleLoop:
        self._loop = asyncio.new_event_loop()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run the coroutine and return its result.

        Raises:
            KeyboardInterrupt: Ctrl-C cancelled the coroutine, which has ended.
        """
        task = self._loop.create_task(coroutine)
        is_main_thread = threading.current_thread() is threading.main_thread()  # other threads cannot handle signals
        pending_signals, discarding = list[int](), ExitStack()

        def cancel() -> None:
            pending_signals.clear()
            task.cancel()

        def interrupt(number: int, _: object) -> None:
            if pending_signals and sys.stdout is not None:
                discarding.enter_context(discard_output(sys.stdout))
            pending_signals.append(number)
            self._loop.call_soon_threadsafe(cancel)

        previous = signal.getsignal(signal.SIGINT)
        if is_main_thread:  # loop.add_signal_handler would run only after a blocked write
            signal.signal(signal.SIGINT, interrupt)
        try:
            return self._loop.run_until_complete(task)
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        finally:
            if is_main_thread:
                signal.signal(signal.SIGINT, previous)
            discarding.close()
