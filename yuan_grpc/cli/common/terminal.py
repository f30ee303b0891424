"""Standard streams: UTF-8, colors and messages on stderr, and output that no longer has a reader."""

from __future__ import annotations

import io
import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

BOLD, DIM, RED, GREEN = "1", "2", "31", "32"
"""Select Graphic Rendition codes."""

_CONTROL_CHARACTERS = (*range(0x20), *range(0x7F, 0xA0))
_LINE_SEPARATORS = (0x2028, 0x2029)
_BIDI_OVERRIDES = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
"""Characters that change the order in which the following text appears."""
_REPLACEMENTS = {
    code: "\ufffd" for code in (*_CONTROL_CHARACTERS, *_LINE_SEPARATORS, *_BIDI_OVERRIDES) if chr(code) not in "\n\t"
}
_INVISIBLE = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories of control, format and surrogate characters and of line and paragraph separators."""


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
    """Replace characters of generated text that send commands to a terminal or reorder its text."""
    return text.translate(_REPLACEMENTS)


def sanitize_line(text: str) -> str:
    """Return the text as one line without invisible characters, so that a server's text cannot pose as other output."""
    visible = (" " if character in "\n\r\t" else _to_visible(character) for character in text)
    return "".join(visible)


def _to_visible(character: str) -> str:
    return "\ufffd" if unicodedata.category(character) in _INVISIBLE else character


def print_stderr(line: str, code: str = "") -> None:
    """Print a line to stderr, in a color if one is given. Ignore a closed pipe."""
    try:
        print(colorize(line, code, sys.stderr) if code else line, file=sys.stderr, flush=True)
    except BrokenPipeError:
        redirect_to_devnull(sys.stderr)


class Notes:
    """Notes and progress on stderr, which `--quiet` turns off for a command.

    Attributes:
        quiet: whether they are off.
    """

    quiet = False


def print_note(line: str) -> None:
    """Print a dim line to stderr, unless the command is quiet."""
    if not Notes.quiet:
        print_stderr(line, DIM)


def print_error(message: str, program: str = "yuan-grpc") -> None:
    """Print an error message to stderr as one line, prefixed with the program's name."""
    print_stderr(f"{colorize(f'{program}:', RED, sys.stderr)} {sanitize_line(message)}")


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
