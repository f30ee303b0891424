"""Output of generated text to stdout or to a file."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from yuan_grpc.cli.common import terminal
from yuan_grpc.cli.common.errors import UsageError


class Output:
    """Destination of generated text: a file, or stdout."""

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
        """Stream that decides on colors: stdout, or None for a file."""
        return None if self._file else sys.stdout

    def write(self, text: str) -> None:
        """Write the text and flush it."""
        if self._file:
            self._file.write(text.encode())
            self._file.flush()
        else:
            print(text, end="", flush=True)

    def sanitize(self, text: str) -> str:
        """Return the text, without control characters if the output is a terminal."""
        return terminal.sanitize(text) if terminal.is_terminal(self.stream) else text
