"""The signals that stop the server."""

import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn


def stop_signals() -> Sequence[signal.Signals]:
    """Return the signals that stop the server: also SIGHUP, sent when a terminal closes, unless `nohup` ignores it."""
    ignores_hangup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGTERM, signal.SIGINT) if ignores_hangup else (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def exit_on_stop_signals() -> None:
    """Let a stop signal end the process with status 0. The server, once it runs, replaces these handlers."""
    for number in stop_signals():
        signal.signal(number, _exit)


def _exit(number: int, frame: object) -> NoReturn:
    # Only a system call: the signal may have interrupted any Python code, which may hold any lock.
    with suppress(OSError):
        os.write(2, f"yuan-grpc: stopped by {signal.Signals(number).name} before the server has started\n".encode())
    os._exit(0)
