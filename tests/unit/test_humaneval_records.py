"""The file of a run: complete lines, each sample once, one run per file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from yuan_grpc.humaneval import records
from yuan_grpc.humaneval.records import Record, RecordFile, RecordsError, Run

RUN = Run({"name": "yuan", "dtype": "float32"}, {"max_tokens": 512}, 2, 7, {"a": "问题", "b": "two"})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Path of a run's file, which does not exist yet."""
    return tmp_path / records.FILE


def test_records_are_read_as_they_were_written(path: Path) -> None:
    written = [Record("a", 0, "中\u2028\n", "stop", None, 28956, 3, 4, 7, "id", "host:1", 0.5)]
    written.append(Record("b", 1, error={"code": "INVALID_ARGUMENT", "message": "too long"}))
    with RecordFile(path, RUN) as file:
        for record in written:
            file.append(record)
    assert records.read(path) == (RUN, written)


def test_a_resumed_run_lacks_the_other_samples_in_order(path: Path) -> None:
    with RecordFile(path, RUN) as file:
        assert file.missing == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
        file.append(Record("b", 0))
    with RecordFile(path, RUN) as file:
        assert file.missing == [("a", 0), ("a", 1), ("b", 1)]


@pytest.mark.parametrize("incomplete", [b"{", b'{"task_id": "a", "sample": 1}', "中".encode()[:2]])
def test_an_incomplete_last_line_is_dropped(path: Path, incomplete: bytes) -> None:
    with RecordFile(path, RUN) as file:
        file.append(Record("a", 0))
    complete = path.read_bytes()
    path.write_bytes(complete + incomplete)
    assert [record.key for record in records.read(path)[1]] == [("a", 0)]
    with RecordFile(path, RUN) as file:
        assert path.read_bytes() == complete
        file.append(Record("a", 1))
    assert [record.key for record in records.read(path)[1]] == [("a", 0), ("a", 1)]


@pytest.mark.timeout(60)
def test_no_truncation_of_the_file_loses_or_duplicates_a_complete_line(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # about 2000 syncs, which a slow disk takes seconds for
    with RecordFile(path, RUN) as file:
        for key in file.missing:
            file.append(Record(*key, text="中"))
    complete = path.read_bytes()
    header = complete.index(b"\n") + 1
    for size in range(header, len(complete) + 1):
        path.write_bytes(complete[:size])
        with RecordFile(path, RUN) as file:
            assert len(file.done) == complete[header:size].count(b"\n")
            for key in file.missing:
                file.append(Record(*key, text="中"))
        assert path.read_bytes() == complete


@pytest.mark.parametrize(
    "other",
    [
        replace(RUN, request={"max_tokens": 256}),
        replace(RUN, samples=3),
        replace(RUN, seed=8),
        replace(RUN, prompts={"a": "问题", "b": "other"}),
        replace(RUN, model={"name": "other", "dtype": "float32"}),
        replace(RUN, model={"name": "yuan", "dtype": "bfloat16"}),
        replace(RUN, model={**RUN.model, "quantization": "fp8"}),
        replace(RUN, model={**RUN.model, "revision": "abc"}),
    ],
    ids=["request", "samples", "seed", "prompts", "model", "dtype", "quantization", "revision"],
)
def test_a_different_run_is_rejected_and_the_file_is_unchanged(path: Path, other: Run) -> None:
    with RecordFile(path, RUN):
        pass
    before = path.read_bytes()
    with pytest.raises(RecordsError, match="belongs to a different run"):
        RecordFile(path, other)
    assert path.read_bytes() == before


def test_a_run_resumes_with_a_newer_version_of_the_server(path: Path) -> None:
    with RecordFile(path, RUN):
        pass
    with RecordFile(path, replace(RUN, model={**RUN.model, "version": "9"}, started="later")) as file:
        assert file.run == RUN


def test_a_file_can_be_opened_only_once_at_a_time(path: Path) -> None:
    with RecordFile(path, RUN), pytest.raises(RecordsError, match="in use"):
        RecordFile(path, RUN)
    with RecordFile(path, RUN):
        pass


def test_a_sample_cannot_be_recorded_twice(path: Path) -> None:
    with RecordFile(path, RUN) as file:
        file.append(Record("a", 0))
        with pytest.raises(RecordsError, match="already recorded"):
            file.append(Record("a", 0))


@pytest.mark.parametrize("line", ['{"task_id": "a", "sample": 0}', '{"task_id": "c", "sample": 0}', "{}", "[", "1"])
def test_a_damaged_file_is_rejected(path: Path, line: str) -> None:
    with RecordFile(path, RUN) as file:
        file.append(Record("a", 0))
    path.write_bytes(path.read_bytes() + line.encode() + b"\n")
    with pytest.raises(RecordsError, match="damaged"):
        records.read(path)


def test_failed_samples_are_dropped_only_on_request(path: Path) -> None:
    with RecordFile(path, RUN) as file:
        file.append(Record("a", 0, error={"code": "INVALID_ARGUMENT", "message": "no"}))
        file.append(Record("b", 0, text="x"))
    with RecordFile(path, RUN) as file:
        assert ("a", 0) not in file.missing
    with RecordFile(path, RUN, retry_failed=True) as file:
        assert file.missing == [("a", 0), ("a", 1), ("b", 1)]
    assert [record.key for record in records.read(path)[1]] == [("b", 0)]


def test_a_full_disk_leaves_no_incomplete_line(path: Path) -> None:
    """Limit the file size of another process."""
    with RecordFile(path, RUN):
        pass
    code = f"""
import resource, signal, sys
from pathlib import Path
from yuan_grpc.humaneval.records import Record, RecordFile, read
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path({str(path)!r})
run, _ = read(path)
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100,) * 2)
with RecordFile(path, run) as file:
    try: file.append(Record("a", 0, "x" * 1000))
    except OSError as error: print(error)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "full" in process.stdout
    assert records.read(path) == (RUN, [])
    assert path.read_bytes().endswith(b"\n")


def test_the_first_line_describes_the_run(path: Path) -> None:
    with RecordFile(path, RUN):
        pass
    assert json.loads(path.read_text("utf-8")) == {"run": asdict(RUN)}
