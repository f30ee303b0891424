"""`yuan_grpc.offline` with a fake engine; engine/test_run.py covers the real one."""

import tempfile
from pathlib import Path

import pytest
from fake_engine import FakeEngine, last

from yuan_grpc import offline
from yuan_grpc.client import Client


def startable(engine: FakeEngine) -> FakeEngine:
    engine.may_start.set()
    return engine


def test_a_client_can_generate_and_the_engine_stops_with_the_block() -> None:
    engine = startable(FakeEngine(last("yes")))
    with offline.serve_engine(engine) as target, Client(target) as yuan:
        assert yuan.generate("AB").text == "yes"
    assert engine.stopped


def test_a_client_is_ready_at_once() -> None:
    with offline.serve_engine(startable(FakeEngine(last()))) as target, Client(target) as yuan:
        yuan.wait_until_ready(timeout=10)


def test_the_engine_stops_when_the_block_fails() -> None:
    engine = startable(FakeEngine(last("yes")))
    with pytest.raises(LookupError), offline.serve_engine(engine):
        raise LookupError
    assert engine.stopped


def test_an_engine_start_error_reaches_the_caller() -> None:
    engine = FakeEngine()
    engine.start_error = MemoryError("too large")
    with pytest.raises(MemoryError, match="too large"), offline.serve_engine(engine):
        pass
    assert engine.stopped


def test_only_the_caller_can_access_the_socket() -> None:
    with offline.serve_engine(startable(FakeEngine(last()))) as target:
        folder = Path(target.removeprefix("unix:")).parent
        assert folder.stat().st_mode & 0o077 == 0
    assert not folder.exists()


def test_a_long_temporary_folder_path_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with offline.serve_engine(startable(FakeEngine(last("yes")))) as target, Client(target) as yuan:
        assert yuan.generate("AB").text == "yes"
