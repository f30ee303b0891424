"""What was generated, as it is kept: whole lines, each sample once, one run in a file."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from yuan_grpc.humaneval import records
from yuan_grpc.humaneval.records import Record, Records, RecordsError, Run

RUN = Run({"name": "yuan", "dtype": "float32"}, {"max_tokens": 512}, 2, 7, {"a": "问题", "b": "two"})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a run's file is to be."""
    return tmp_path / records.FILE


def test_records_come_back_as_they_were_kept(path: Path) -> None:
    kept = [Record("a", 0, "中\u2028\n", "stop", None, 28956, 3, 4, 7, "id", "host:1", 0.5)]
    kept.append(Record("b", 1, error={"code": "INVALID_ARGUMENT", "message": "too long"}))
    with Records(path, RUN) as file:
        for record in kept:
            file.append(record)
    assert records.read(path) == (RUN, kept)


def test_a_run_goes_on_with_what_is_missing_in_order(path: Path) -> None:
    with Records(path, RUN) as file:
        assert file.missing == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
        file.append(Record("b", 0))
    with Records(path, RUN) as file:
        assert file.missing == [("a", 0), ("a", 1), ("b", 1)]


@pytest.mark.parametrize("torn", [b"{", b'{"task_id": "a", "sample": 1}', "中".encode()[:2]])
def test_a_torn_last_line_is_dropped(path: Path, torn: bytes) -> None:
    with Records(path, RUN) as file:
        file.append(Record("a", 0))
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert [record.key for record in records.read(path)[1]] == [("a", 0)]
    with Records(path, RUN) as file:
        assert path.read_bytes() == whole
        file.append(Record("a", 1))
    assert [record.key for record in records.read(path)[1]] == [("a", 0), ("a", 1)]


def test_no_cut_of_the_file_loses_or_doubles_a_whole_line(path: Path) -> None:
    with Records(path, RUN) as file:
        for key in file.missing:
            file.append(Record(*key, text="中"))
    whole = path.read_bytes()
    head = whole.index(b"\n") + 1
    for size in range(head, len(whole) + 1):
        path.write_bytes(whole[:size])
        with Records(path, RUN) as file:
            assert len(file.done) == whole[head:size].count(b"\n")
            for key in file.missing:
                file.append(Record(*key, text="中"))
        assert path.read_bytes() == whole


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
def test_another_run_is_refused_and_nothing_is_changed(path: Path, other: Run) -> None:
    with Records(path, RUN):
        pass
    before = path.read_bytes()
    with pytest.raises(RecordsError, match="another run's"):
        Records(path, other)
    assert path.read_bytes() == before


def test_a_server_of_a_newer_version_may_go_on(path: Path) -> None:
    with Records(path, RUN):
        pass
    with Records(path, replace(RUN, model={**RUN.model, "version": "9"}, started="later")) as file:
        assert file.run == RUN


def test_two_processes_cannot_write_the_same_run(path: Path) -> None:
    with Records(path, RUN), pytest.raises(RecordsError, match="in use"):
        Records(path, RUN)
    with Records(path, RUN):
        pass


def test_a_sample_cannot_be_kept_twice(path: Path) -> None:
    with Records(path, RUN) as file:
        file.append(Record("a", 0))
        with pytest.raises(RecordsError, match="there already"):
            file.append(Record("a", 0))


@pytest.mark.parametrize("line", ['{"task_id": "a", "sample": 0}', '{"task_id": "c", "sample": 0}', "{}", "[", "1"])
def test_a_damaged_file_is_refused(path: Path, line: str) -> None:
    with Records(path, RUN) as file:
        file.append(Record("a", 0))
    path.write_bytes(path.read_bytes() + line.encode() + b"\n")
    with pytest.raises(RecordsError, match="damaged"):
        records.read(path)


def test_failed_samples_are_forgotten_only_when_asked(path: Path) -> None:
    with Records(path, RUN) as file:
        file.append(Record("a", 0, error={"code": "INVALID_ARGUMENT", "message": "no"}))
        file.append(Record("b", 0, text="x"))
    with Records(path, RUN) as file:
        assert ("a", 0) not in file.missing
    with Records(path, RUN, retry_failed=True) as file:
        assert file.missing == [("a", 0), ("a", 1), ("b", 1)]
    assert [record.key for record in records.read(path)[1]] == [("b", 0)]


def test_a_full_disk_keeps_no_half_line(path: Path) -> None:
    """In a process of its own, whose files may not grow beyond a limit."""
    with Records(path, RUN):
        pass
    code = f"""
import resource, signal, sys
from pathlib import Path
from yuan_grpc.humaneval.records import Record, Records, read
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path({str(path)!r})
run, _ = read(path)
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100,) * 2)
with Records(path, run) as file:
    try: file.append(Record("a", 0, "x" * 1000))
    except OSError as error: print(error)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "full" in told.stdout
    assert records.read(path) == (RUN, [])
    assert path.read_bytes().endswith(b"\n")


def test_the_first_line_says_what_the_run_is_of(path: Path) -> None:
    with Records(path, RUN):
        pass
    assert json.loads(path.read_text("utf-8")) == {"run": asdict(RUN)}
