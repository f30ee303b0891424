"""Messages typed at a terminal: of one line or several, with line editing and a history that outlives the command."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

PROMPT, CONTINUATION = "> ", "… "
QUOTES = '"""'
"""Begins and ends a message of several lines."""
HISTORY_LINES = 1000


def read_messages(*, keeps_history: bool = True) -> Iterator[str]:
    r'''Yield messages from the terminal until Ctrl-C or Ctrl-D at the prompt.

    A message has several lines if it is between lines with `"""`, or if a line ends with a backslash. A message between
    quotes is never a command. Lines of earlier chats can be found unless `keeps_history` is false.
    '''
    with _history(keeps_history):
        while True:
            try:
                line = input(PROMPT)
            except (EOFError, KeyboardInterrupt):
                print()
                return
            try:
                yield _read_rest(line)
            except EOFError:
                print()
                return
            except KeyboardInterrupt:  # discards the message that is being typed
                print()


def _read_rest(line: str) -> str:
    if line.lstrip().startswith(QUOTES):
        return _read_quoted(line.lstrip().removeprefix(QUOTES))
    while line.endswith("\\"):
        line = line[:-1] + "\n" + input(CONTINUATION)
    return line


def _read_quoted(text: str) -> str:
    while not text.rstrip().endswith(QUOTES):
        text += "\n" + input(CONTINUATION)
    message = text.rstrip().removesuffix(QUOTES).strip("\n")
    return f"/{message}" if message.startswith("/") else message


@contextlib.contextmanager
def _history(is_kept: bool) -> Iterator[None]:
    """Let `input` edit lines and find those of this chat. If they are kept, also read and save those of others."""
    try:
        import readline
    except ImportError:
        yield
        return
    readline.set_history_length(HISTORY_LINES)
    if is_kept:
        with contextlib.suppress(OSError):
            readline.read_history_file(_history_path())
    try:
        yield
    finally:
        if is_kept:
            with contextlib.suppress(OSError):
                _save_history(_history_path())


def _save_history(path: Path) -> None:
    import readline

    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.touch(mode=0o600)  # readline keeps the mode of a file that exists
    readline.write_history_file(path)


def _history_path() -> Path:
    folder = os.environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser()
    return Path(folder) / "yuan-grpc" / "chat_history"
