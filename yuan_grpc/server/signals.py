"""The signals that stop the server."""

import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import NoReturn

from yuan_grpc.server.log_format import format_line

LOG_SECONDS = 0.1
"""Time for the thread of the log to write the lines before the last one, in seconds."""


def stop_signals() -> Sequence[signal.Signals]:
    """Return the signals that stop the server: also SIGHUP, sent when a terminal closes, unless `nohup` ignores it."""
    ignores_hangup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGTERM, signal.SIGINT) if ignores_hangup else (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def exit_on_stop_signals(log_format: str = "text") -> None:
    """Let a stop signal end the process with status 0. The server, once it runs, replaces these handlers."""
    for number in stop_signals():
        signal.signal(number, partial(_exit, log_format))


def _exit(log_format: str, number: int, frame: object) -> NoReturn:
    time.sleep(LOG_SECONDS)
    # Takes no lock: the signal may have interrupted any Python code, which may hold any.
    message = f"yuan-grpc: stopped by {signal.Signals(number).name} before the server has started"
    with suppress(OSError):
        os.write(2, format_line(log_format, "INFO", message).encode())
    os._exit(0)
