"""The folders that the engine writes to: ours, private, and refused if another user could have filled them."""

import os
import tempfile
from pathlib import Path

import pytest

from yuan_grpc.server.engine.vllm import env


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of a user whose environment sets no folder of the engine."""
    for variable in (*env.DEFAULTS, *env.CACHE_FOLDERS):
        monkeypatch.setenv(variable, "")  # so that monkeypatch restores it
        monkeypatch.delenv(variable)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "yuan-grpc"


def test_compiled_code_is_kept_in_private_folders(cache: Path) -> None:
    env.set_defaults()
    folders = [Path(os.environ[variable]) for variable in env.CACHE_FOLDERS]
    assert all(folder.is_relative_to(cache) for folder in folders)
    assert {folder.stat().st_mode & 0o777 for folder in (cache, *folders)} == {0o700}
    env.set_defaults()
    assert folders == [Path(os.environ[variable]) for variable in env.CACHE_FOLDERS]


def test_folders_of_the_operator_are_used(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in env.CACHE_FOLDERS:
        monkeypatch.setenv(variable, str(tmp_path / variable))
    env.set_defaults()
    assert {os.environ[variable] for variable in env.CACHE_FOLDERS} == {str(tmp_path / v) for v in env.CACHE_FOLDERS}
    assert not cache.exists()


def test_the_predictable_folder_that_torch_sets_is_replaced(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_root")
    env.set_defaults()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(cache / "inductor")


@pytest.mark.parametrize("name", ["", "inductor"])
@pytest.mark.parametrize("mode", [0o777, 0o775, 0o722])
def test_a_folder_that_others_can_write_to_is_refused(cache: Path, name: str, mode: int) -> None:
    env.set_defaults()
    (cache / name).chmod(mode)
    del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    with pytest.raises(env.UnsafeFolderError, match=f"must be writable by its owner only, not have mode {mode:04o}"):
        env.set_defaults()


def test_a_folder_of_another_user_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir(mode=0o755, parents=True)
    monkeypatch.setattr(os, "getuid", lambda: cache.stat().st_uid + 1)
    with pytest.raises(env.UnsafeFolderError, match=r"must belong to this user, \d+, not to \d+$"):
        env.set_defaults()


def test_a_link_to_a_folder_is_refused(cache: Path, tmp_path: Path) -> None:
    cache.parent.mkdir()
    cache.symlink_to(tmp_path)
    with pytest.raises(env.UnsafeFolderError, match="must be a folder, not a link to one"):
        env.set_defaults()


def test_a_temporary_folder_is_used_where_other_users_could_replace_the_folder(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.mkdir()
    cache.parent.chmod(0o777)
    env.set_defaults()
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert folder.parent.parent == Path(tempfile.gettempdir())
    assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777 == 0o700
    assert f"every user can rename folders in {cache.parent}" in caplog.text


def test_a_temporary_folder_is_used_if_there_is_no_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    env.set_defaults()
    assert Path(os.environ["VLLM_CACHE_ROOT"]).parent.parent == Path(tempfile.gettempdir())


def test_processes_started_in_the_block_use_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", "/run/operator")
    with env.temporary_folder(str(tmp_path)):
        assert os.environ["TMPDIR"] == str(tmp_path)
        assert os.environ["VLLM_RPC_BASE_PATH"] == "/run/operator"
    assert "TMPDIR" not in os.environ
    assert os.environ["VLLM_RPC_BASE_PATH"] == "/run/operator"
