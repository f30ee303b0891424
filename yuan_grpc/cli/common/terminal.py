"""Standard streams: in UTF-8, in colour on a terminal alone, and quiet when nobody reads them any more."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

BOLD, DIM, RED = "1", "2", "31"
"""Select Graphic Rendition codes."""

_HIDDEN = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def use_utf8() -> None:
    """Reads and writes UTF-8 from here on, whatever the locale says; what is no character is shown as an escape."""
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors=errors)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person is looking at it. A stream that was closed before the program began is None."""
    return stream is not None and stream.isatty()


def painted(text: str, code: str, stream: TextIO | None) -> str:
    """The text in a colour, where the stream is a terminal and `NO_COLOR` is not set."""
    if is_terminal(stream) and not os.environ.get("NO_COLOR"):
        return f"\x1b[{code}m{text}\x1b[0m"
    return text


def visible(text: str) -> str:
    """The text without characters that a terminal would obey: what a model writes must not move the cursor."""
    return text.translate(_HIDDEN)


def tell(sentence: str, code: str = "") -> None:
    """Writes a line to stderr, painted. Nobody there to read it is no error."""
    try:
        print(painted(sentence, code, sys.stderr) if code else sentence, file=sys.stderr, flush=True)
    except BrokenPipeError:
        hush(sys.stderr)


def complain(sentence: str) -> None:
    """Tells what went wrong, in the way of all commands."""
    tell(f"{painted('yuan-grpc:', RED, sys.stderr)} {visible(sentence)}")


@contextmanager
def silenced(stream: TextIO) -> Iterator[None]:
    """What is written within goes nowhere."""
    kept = os.dup(stream.fileno())
    try:
        hush(stream)
        yield
    finally:
        os.dup2(kept, stream.fileno())
        os.close(kept)


def hush(stream: TextIO) -> None:
    """Sends to nowhere what is still to be written, so that the interpreter can end without a word about it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
