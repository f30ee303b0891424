"""Standard streams: UTF-8, colors and messages on stderr, and output that no longer has a reader."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

BOLD, DIM, RED = "1", "2", "31"
"""Select Graphic Rendition codes."""

_CONTROL_CHARACTERS = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def use_utf8() -> None:
    """Switch the standard streams to UTF-8, independent of the locale. Output escapes lone surrogates."""
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors=errors)


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether the stream is a terminal. A stream that was closed before the program started is None."""
    return stream is not None and stream.isatty()


def colorize(text: str, code: str, stream: TextIO | None) -> str:
    """Return the text in a color if the stream is a terminal and `NO_COLOR` is not set."""
    if is_terminal(stream) and not os.environ.get("NO_COLOR"):
        return f"\x1b[{code}m{text}\x1b[0m"
    return text


def sanitize(text: str) -> str:
    """Replace control characters, so that generated text cannot send commands to a terminal."""
    return text.translate(_CONTROL_CHARACTERS)


def print_stderr(line: str, code: str = "") -> None:
    """Print a line to stderr, in a color if one is given. Ignore a closed pipe."""
    try:
        print(colorize(line, code, sys.stderr) if code else line, file=sys.stderr, flush=True)
    except BrokenPipeError:
        redirect_to_devnull(sys.stderr)


def print_error(message: str) -> None:
    """Print an error message to stderr, prefixed with the program's name."""
    print_stderr(f"{colorize('yuan-grpc:', RED, sys.stderr)} {sanitize(message)}")


@contextmanager
def discard_output(stream: TextIO) -> Iterator[None]:
    """Discard everything written to the stream inside the block."""
    saved = os.dup(stream.fileno())
    try:
        redirect_to_devnull(stream)
        yield
    finally:
        os.dup2(saved, stream.fileno())
        os.close(saved)


def redirect_to_devnull(stream: TextIO) -> None:
    """Redirect the stream to /dev/null. Data left in its buffer then causes no error when the interpreter exits."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, stream.fileno())
    os.close(devnull)
