"""Generated samples on disk: an append-only JSONL file that a crash cannot corrupt.

The first line describes the run: the model, the request and the prompts. Each other line is one sample. A line is
written by one system call and synced before it counts. After a crash at most the last line is incomplete; it is dropped
and its sample is generated again.
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
MODEL_IDENTITY = ("name", "revision", "dtype", "quantization")
"""Model fields that samples depend on."""
FILE = "generations.jsonl"
SampleKey = tuple[str, int]
"""Task ID and sample number, from 0."""


class RecordsError(ValueError):
    """A file that is not a run, belongs to a different run, or is in use; the message says which."""


@dataclass(frozen=True)
class Run:
    """Settings of a run. A run can be resumed only with the same settings."""

    model: dict[str, Any]
    """Name, dtype and versions, as GetModel returns them."""
    request: dict[str, Any]
    samples: int
    seed: int | None
    """Seed of sample 0 of each task; sample i uses this plus i. None means greedy."""
    prompts: dict[str, str]
    prompts_file: str = ""
    started: str = ""
    format: int = FORMAT

    @property
    def keys(self) -> list[SampleKey]:
        """All samples in order: sample 0 of each task, then sample 1 of each task, and so on."""
        return [(task_id, sample) for sample in range(self.samples) for task_id in self.prompts]

    def difference(self, other: Run) -> str | None:
        """Describe the first setting of another run that would change the samples; None if the runs are compatible."""
        for name in ("format", "request", "samples", "seed"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} {mine!r}, not {theirs!r}"
        if any((self.model.get(name) or "") != (other.model.get(name) or "") for name in MODEL_IDENTITY):
            return f"model {self.model!r}, not {other.model!r}"
        if hash_prompts(self.prompts) != hash_prompts(other.prompts):
            return f"prompts with SHA-256 {hash_prompts(self.prompts)}, not {hash_prompts(other.prompts)}"
        return None


@dataclass(frozen=True)
class Record:
    """A sample: its raw text and metadata. A record with an `error` has no text."""

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
    """Duration of the call."""
    error: dict[str, str] | None = field(default=None)
    """`code` and `message` of a permanent failure."""

    @property
    def key(self) -> SampleKey:
        """The task ID and the sample number."""
        return self.task_id, self.sample


def hash_prompts(prompts: dict[str, str]) -> str:
    """Return the SHA-256 of all prompts with their task IDs, in order."""
    return hashlib.sha256(json.dumps(list(prompts.items())).encode()).hexdigest()


def hash_records(records: Iterable[Record]) -> str:
    """Return the SHA-256 of the samples' keys, texts and errors, independent of their order."""
    texts = sorted((record.task_id, record.sample, record.text, str(record.error)) for record in records)
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def encode_line(row: dict[str, Any]) -> bytes:
    """Return a row as one line of JSONL in UTF-8. A lone surrogate becomes its JSON escape, such as `\\ud800`."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def read(path: Path) -> tuple[Run, list[Record]]:
    """Return a run and its samples in file order, without an incomplete last line.

    Raises:
        RecordsError: the file is not a run, or is damaged.
    """
    if not path.exists():
        raise RecordsError(f"{path.parent} is not a run: it has no {path.name}")
    complete, _, _ = path.read_bytes().rpartition(b"\n")
    if not complete:
        raise RecordsError(f"{path} is not a run: it is empty")
    try:
        header, *rows = (json.loads(text) for text in complete.split(b"\n"))
        run, records = Run(**header["run"]), [Record(**row) for row in rows]
    except (ValueError, TypeError, KeyError) as error:
        raise RecordsError(f"{path} is not a run or is damaged: {error}") from error
    keys = [record.key for record in records]
    if len(set(keys)) < len(keys) or not set(keys) <= set(run.keys):
        raise RecordsError(f"{path} is damaged: it has duplicate samples, or samples that are not part of the run")
    return run, records


class RecordFile:
    """The file of a run, open for appending and locked against other processes."""

    def __init__(self, path: Path, run: Run, *, retry_failed: bool = False) -> None:
        """Create the file, or open it to resume its run.

        Args:
            path: the file.
            run: settings, which must equal those of an existing file.
            retry_failed: whether to drop the samples that have an error.

        Raises:
            RecordsError: the file belongs to a different run or is in use.
        """
        self.path = path
        self._lock = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._acquire_lock()
            if path.exists():
                run, records = self._read_existing(run)
            else:
                records = []
            kept = [record for record in records if not (retry_failed and record.error)]
            if not path.exists() or len(kept) < len(records):
                header = encode_line({"run": asdict(run)})
                replace_file(path, b"".join([header, *(encode_line(asdict(record)) for record in kept)]))
            self.run, self.done = run, {record.key: record for record in kept}
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
            self._drop_incomplete_line()
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)
        os.close(self._lock)

    def append(self, record: Record) -> None:
        """Write a sample and sync it to disk.

        Raises:
            OSError: the disk is full; the sample is not recorded.
            RecordsError: the sample is already recorded.
        """
        if record.key in self.done:
            raise RecordsError(f"{record.task_id}, sample {record.sample}, is already recorded")
        text = encode_line(asdict(record))
        if os.write(self._file, text) != len(text):
            self._drop_incomplete_line()
            raise OSError(f"{self.path}: the disk is full")
        os.fsync(self._file)
        self.done[record.key] = record

    @property
    def missing(self) -> list[SampleKey]:
        """The samples that are not recorded yet, in order."""
        return [key for key in self.run.keys if key not in self.done]

    def _acquire_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RecordsError(f"{self.path} is in use: another process generates into it") from error

    def _read_existing(self, run: Run) -> tuple[Run, list[Record]]:
        existing, records = read(self.path)
        difference = existing.difference(run)
        if difference:
            raise RecordsError(
                f"{self.path} belongs to a different run ({difference}): "
                "choose another folder or rerun with the settings of that run"
            )
        return existing, records

    def _drop_incomplete_line(self) -> None:
        size = os.fstat(self._file).st_size
        complete = self.path.read_bytes().rfind(b"\n") + 1
        if complete < size:
            os.ftruncate(self._file, complete)
            os.fsync(self._file)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file atomically: after a crash it has the old content or the new."""
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
