"""Answers on their way out: to stdout or to a file, at once."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from yuan_grpc.cli.common.errors import UsageError
from yuan_grpc.cli.common.terminal import is_terminal, visible


class Output:
    """Where answers go: a file, or stdout."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: Any = None

    def __enter__(self) -> Output:
        if self._path:
            try:
                self._file = self._path.open("wb")
            except OSError as error:
                raise UsageError(f"{self._path} cannot be written: {error.strerror}") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file:
            self._file.close()

    @property
    def stream(self) -> Any:
        """What colours depend on: stdout, or None for a file."""
        return None if self._file else sys.stdout

    def write(self, text: str) -> None:
        """Writes the text, and leaves none of it in a buffer."""
        if self._file:
            self._file.write(text.encode())
            self._file.flush()
        else:
            print(text, end="", flush=True)

    def shown(self, text: str) -> str:
        """The text as it may be written: to a terminal without control characters."""
        return visible(text) if is_terminal(self.stream) else text
