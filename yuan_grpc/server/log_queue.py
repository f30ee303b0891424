"""Writing to stderr without blocking: a thread writes the lines, and drops those that do not fit into its queue."""

import atexit
import io
import logging
import os
import select
import stat
import sys
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread

from yuan_grpc.server.log_format import create_formatter, format_line

MAX_TEXTS = 4096
"""Number of texts, usually lines, that wait to be written."""
FLUSH_SECONDS = 1.0
"""Time for the last lines to be written when the process exits, in seconds."""
POLL_MILLISECONDS = 1000

_STDERR = 2


class QueuedStream(io.TextIOBase):
    """A stream to stderr for logging and `print`.

    A pipe that nobody reads, or a full disk, does not block the process. When stderr can be written again, the number
    of dropped lines is written.

    Args:
        log_format: the format of that line, text or json.
    """

    def __init__(self, log_format: str = "text") -> None:
        self._log_format = log_format
        self._texts = SimpleQueue[str | None]()
        self._dropped = 0
        self._thread = Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def write(self, text: str) -> int:
        """Pass a text to the thread, or drop it."""
        if self._is_full:
            self._dropped += text.count("\n")
        else:
            self._texts.put(text)
        return len(text)

    def fileno(self) -> int:
        """Return the descriptor of stderr."""
        return _STDERR

    def isatty(self) -> bool:
        """Return whether stderr is a terminal."""
        return os.isatty(_STDERR)

    def drain(self) -> None:
        """End the thread when it has written the remaining texts; stop waiting for it after some time."""
        if not self._is_full:
            self._texts.put(None)
            self._thread.join(FLUSH_SECONDS)

    @property
    def _is_full(self) -> bool:
        return self._texts.qsize() >= MAX_TEXTS

    def _run(self) -> None:
        while (text := self._texts.get()) is not None:
            dropped, self._dropped = self._dropped, 0
            notice = format_line(self._log_format, "WARNING", f"{dropped} log lines were dropped") if dropped else ""
            if not _write_all(text + notice):
                self._dropped += dropped + text.count("\n")


def _write_all(text: str) -> bool:
    """Write a text, waiting as long as the reader does not read; return whether it could be written."""
    remaining = text.encode(errors="backslashreplace")
    while remaining:
        try:
            remaining = remaining[os.write(_STDERR, remaining) :]
        except BlockingIOError:
            poll = select.poll()
            poll.register(_STDERR, select.POLLOUT)
            poll.poll(POLL_MILLISECONDS)
        except OSError:  # such as a full disk
            return False
    return True


def install(log_format: str = "text") -> None:
    """Replace `sys.stderr`, before libraries are imported that keep a reference to it."""
    _make_stderr_non_blocking()
    sys.stderr = QueuedStream(log_format)
    atexit.register(sys.stderr.drain)


def configure(level: str, log_format: str) -> None:
    """Send the log of this process to stderr without blocking.

    Args:
        level: the lowest level of the log, such as "info".
        log_format: text or json.
    """
    install(log_format)
    handler = logging.StreamHandler()
    handler.setFormatter(create_formatter(log_format))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(log_format == "json")


def drain() -> None:
    """Write the remaining lines, if `sys.stderr` has been replaced and they can be written soon."""
    if isinstance(sys.stderr, QueuedStream):
        sys.stderr.drain()


def _make_stderr_non_blocking() -> None:
    """Let writes to a full pipe fail instead of block, also those of C code and of engine processes.

    The pipe is opened anew, because the flag is shared by all processes that have inherited the same open file.
    """
    if not stat.S_ISFIFO(os.fstat(_STDERR).st_mode):
        return
    with suppress(OSError):  # the pipe belongs to another user, or has no reader
        descriptor = os.open(f"/proc/self/fd/{_STDERR}", os.O_WRONLY | os.O_NONBLOCK)
        os.dup2(descriptor, _STDERR)
        os.close(descriptor)
