"""What was generated, as it is kept: a file that only grows, and that no crash leaves half a line in.

The first line says what the run is of: the model, the request and the prompts. Each other is one sample. A line is
written by one call and synced before it counts, so after a crash at most the last one is torn; it is dropped, and its
sample generated again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

FORMAT = 1
SAME_MODEL = ("name", "revision", "dtype", "quantization")
"""What a model's samples depend on, of what is kept of it."""
FILE = "generations.jsonl"
Key = tuple[str, int]
"""A sample: the task and the sample's number, from 0."""


class RecordsError(ValueError):
    """The file is not a run's, is another run's, or is in use; the message says which."""


@dataclass(frozen=True)
class Run:
    """What a run is of. One that is resumed must be of the same."""

    model: dict[str, Any]
    """What GetModel told: the name, the numbers it computes in, and the versions."""
    request: dict[str, Any]
    samples: int
    seed: int | None
    """That of each task's sample 0; sample i has this plus i. None: greedy."""
    prompts: dict[str, str]
    prompts_file: str = ""
    started: str = ""
    format: int = FORMAT

    @property
    def keys(self) -> list[Key]:
        """All samples, in order: each task's first sample before any second."""
        return [(task_id, sample) for sample in range(self.samples) for task_id in self.prompts]

    def difference(self, other: Run) -> str | None:
        """What makes another run's samples unlike this one's, in words; None if nothing does."""
        for name in ("format", "request", "samples", "seed"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} {mine!r}, not {theirs!r}"
        if any((self.model.get(name) or "") != (other.model.get(name) or "") for name in SAME_MODEL):
            return f"model {self.model!r}, not {other.model!r}"
        if digest(self.prompts) != digest(other.prompts):
            return f"prompts with the SHA-256 {digest(self.prompts)}, not {digest(other.prompts)}"
        return None


@dataclass(frozen=True)
class Record:
    """A sample: its raw text, and how it came about. With an `error` there is no text."""

    task_id: str
    sample: int
    text: str = ""
    finish_reason: str | None = None
    stop_string: str | None = None
    stop_token_id: int | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seed: int | None = None
    request_id: str = ""
    target: str = ""
    seconds: float = 0.0
    """From the call to its answer."""
    error: dict[str, str] | None = field(default=None)
    """`code` and `message` of a request that the server will not serve, however often it is asked."""

    @property
    def key(self) -> Key:
        """Which sample it is."""
        return self.task_id, self.sample


def digest(prompts: dict[str, str]) -> str:
    """The SHA-256 of all prompts with their tasks, in order."""
    return hashlib.sha256(json.dumps(list(prompts.items())).encode()).hexdigest()


def digest_of(records: Iterable[Record]) -> str:
    """The SHA-256 of samples, in whatever order they came: of their texts and errors, and whose they are."""
    texts = sorted((record.task_id, record.sample, record.text, str(record.error)) for record in records)
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def line(row: dict[str, Any]) -> bytes:
    """A row of jsonl."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def read(path: Path) -> tuple[Run, list[Record]]:
    """A run and its samples, in the order in which they were written; a torn last line is left out.

    Raises RecordsError for what is no such file, and FileNotFoundError.
    """
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    if not whole:
        raise RecordsError(f"{path} is empty: not a run")
    try:
        first, *others = (json.loads(text) for text in whole.split(b"\n"))
        run, records = Run(**first["run"]), [Record(**row) for row in others]
    except (ValueError, TypeError, KeyError) as error:
        raise RecordsError(f"{path} is not a run's file, or is damaged: {error}") from error
    keys = [record.key for record in records]
    if len(set(keys)) < len(keys) or not set(keys) <= set(run.keys):
        raise RecordsError(f"{path} is damaged: it has samples twice, or samples that the run has not")
    return run, records


class Records:
    """The file of a run, open for more. Nobody else can have it open at the same time."""

    def __init__(self, path: Path, run: Run, *, retry_failed: bool = False) -> None:
        """Begins the run, or goes on with it; `retry_failed` forgets the samples that have an error.

        Raises RecordsError where the file is of another run or in use.
        """
        self.path = path
        self._lock = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._hold()
            if path.exists():
                run, records = self._checked(run)
            else:
                records = []
            kept = [record for record in records if not (retry_failed and record.error)]
            if not path.exists() or len(kept) < len(records):
                replace(path, b"".join([line({"run": asdict(run)}), *(line(asdict(record)) for record in kept)]))
            self.run, self.done = run, {record.key: record for record in kept}
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
            self._drop_torn_line()
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> Records:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)
        os.close(self._lock)

    def append(self, record: Record) -> None:
        """Keeps a sample, for good once this returns. Raises OSError where the disk is full; then nothing is kept."""
        if record.key in self.done:
            raise RecordsError(f"{record.task_id}, sample {record.sample}, is there already")
        text = line(asdict(record))
        if os.write(self._file, text) != len(text):
            self._drop_torn_line()
            raise OSError(f"{self.path}: the disk is full")
        os.fsync(self._file)
        self.done[record.key] = record

    @property
    def missing(self) -> list[Key]:
        """The samples still to be generated, in order."""
        return [key for key in self.run.keys if key not in self.done]

    def _hold(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RecordsError(f"{self.path} is in use: another process generates into it") from error

    def _checked(self, run: Run) -> tuple[Run, list[Record]]:
        begun, records = read(self.path)
        difference = begun.difference(run)
        if difference:
            raise RecordsError(f"{self.path} is another run's, with {difference}: choose another folder, or the same")
        return begun, records

    def _drop_torn_line(self) -> None:
        size = os.fstat(self._file).st_size
        whole = self.path.read_bytes().rfind(b"\n") + 1
        if whole < size:
            os.ftruncate(self._file, whole)
            os.fsync(self._file)


def replace(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
