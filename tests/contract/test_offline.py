"""An engine in the caller's own care, by hand here; the real one's turn is in engine/test_run.py."""

import tempfile
from pathlib import Path

import pytest
from fake_engine import FakeEngine, last

from yuan_grpc import offline
from yuan_grpc.client import Client


def startable(engine: FakeEngine) -> FakeEngine:
    engine.may_start.set()
    return engine


def test_a_client_of_it_is_answered_and_it_ends_with_the_block() -> None:
    engine = startable(FakeEngine(last("yes")))
    with offline.running(engine) as target, Client(target) as yuan:
        assert yuan.generate("AB").text == "yes"
    assert engine.stopped


def test_it_ends_when_the_block_fails() -> None:
    engine = startable(FakeEngine(last("yes")))
    with pytest.raises(LookupError), offline.running(engine):
        raise LookupError
    assert engine.stopped


def test_an_engine_that_cannot_be_started_says_why() -> None:
    engine = FakeEngine()
    engine.start_error = MemoryError("too large")
    with pytest.raises(MemoryError, match="too large"), offline.running(engine):
        pass
    assert engine.stopped


def test_its_socket_is_the_callers_alone() -> None:
    with offline.running(startable(FakeEngine(last()))) as target:
        folder = Path(target.removeprefix("unix:")).parent
        assert folder.stat().st_mode & 0o077 == 0
    assert not folder.exists()


def test_a_long_folder_for_temporary_files_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with offline.running(startable(FakeEngine(last("yes")))) as target, Client(target) as yuan:
        assert yuan.generate("AB").text == "yes"
