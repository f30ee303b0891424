"""Temporary folders that killed servers have left."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from yuan_grpc.server.engine.vllm.env import PREFIX
from yuan_grpc.server.engine.vllm.folders import TemporaryFolder

_SERVER = """
import sys
from yuan_grpc.server.engine.vllm.folders import TemporaryFolder
folder = TemporaryFolder()
print(folder.name, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let temporary files be created in a folder of the test."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)


@pytest.mark.timeout(60)
def test_the_folder_of_a_killed_server_is_removed_by_the_next_one(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command, pipe = [sys.executable, "-c", _SERVER], subprocess.PIPE
    with subprocess.Popen(command, env=environment, text=True, stdin=pipe, stdout=pipe) as server:
        assert server.stdout is not None
        folder = Path(server.stdout.readline().strip())
        second = TemporaryFolder()
        assert folder.is_dir()  # its server is running
        second.cleanup()
        server.send_signal(signal.SIGKILL)
        server.wait()
    assert folder.is_dir()
    third = TemporaryFolder()
    assert not folder.exists()
    third.cleanup()
    assert list(tmp_path.iterdir()) == []


def test_folders_without_a_lock_and_links_are_left_alone(tmp_path: Path) -> None:
    other, target = tmp_path / f"{PREFIX}other", tmp_path / "target"
    other.mkdir()
    target.write_text("")
    linked = tmp_path / f"{PREFIX}linked"
    linked.mkdir()
    (linked / "lock").symlink_to(target)
    folder = TemporaryFolder()
    folder.cleanup()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["target", f"{PREFIX}linked", f"{PREFIX}other"]
