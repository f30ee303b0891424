"""Processes of vLLM that are forks of one process."""

import os
import sys
from importlib import import_module
from multiprocessing import spawn
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]  # vLLM's warnings while it is imported

WAIT_SECONDS = 300
REPORT_THREADS = """
import os, torch
out.write_text(f"{len(os.listdir('/proc/self/task'))} {torch.get_num_threads()}")
"""


@pytest.fixture
def start() -> Any:
    """Returns a function that starts a process in the way in which vLLM starts one, and returns it."""
    from engine_forks import fork_engines
    from vllm.utils import system_utils

    fork_engines()

    def start_process(target: Any, *arguments: Any) -> Any:
        process = system_utils.get_mp_context().Process(target=target, args=arguments, name="Some-Process")
        process.start()
        return process

    return start_process


@pytest.mark.parametrize(
    ("platform", "has_context", "is_wsl", "expected"),
    [
        ("cpu", False, False, True),
        ("cpu", False, True, True),
        ("cuda", False, False, True),
        ("cuda", True, False, False),
        ("cuda", False, True, False),
        ("rocm", False, False, False),
    ],
)
def test_processes_are_forked_where_nothing_of_a_gpu_is_lost(
    platform: str, has_context: bool, is_wsl: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from yuan_grpc.server.engine.vllm import warm_fork

    checks = {f"is_{name}": lambda name=name: name == platform for name in ("cpu", "cuda")}
    monkeypatch.setattr(warm_fork, "current_platform", SimpleNamespace(**checks))
    monkeypatch.setattr(warm_fork, "cuda_is_initialized", lambda: has_context)
    monkeypatch.setattr(warm_fork, "in_wsl", lambda: is_wsl)
    assert warm_fork.is_possible() is expected


def test_all_of_vllm_that_starts_processes_forks_them(start: Any) -> None:
    import vllm

    from yuan_grpc.server.engine.vllm import warm_fork

    root = Path(vllm.__file__).parents[1]
    users = {file for file in root.glob("vllm/**/*.py") if "get_mp_context" in file.read_text(errors="ignore")}
    names = {".".join(file.relative_to(root).with_suffix("").parts) for file in users}
    assert names == {target.partition(":")[0] for target in warm_fork.TARGETS}
    for name in names:
        assert import_module(name).get_mp_context is warm_fork._Context


def test_a_fork_has_the_threads_of_its_environment_and_starts_none_by_itself(
    start: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def threads(count: str) -> tuple[str, str]:
        """Return how many threads a fork has, and how many torch would use, with this number in the environment."""
        monkeypatch.setenv("OMP_NUM_THREADS", count)
        process = start(exec, REPORT_THREADS, {"out": tmp_path / "out"})
        process.join(WAIT_SECONDS)
        assert process.exitcode == 0
        running, usable = (tmp_path / "out").read_text().split()
        return running, usable

    _, default = threads("")
    assert threads(default) == ("1", default)
    assert threads("1") == ("1", "1")


def test_a_process_that_vllm_binds_to_a_numa_node_is_not_forked(
    start: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    numactl = tmp_path / "numactl"
    numactl.write_text(f'#!/bin/sh\necho bound > {tmp_path}/bound\nexec {sys.executable} "$@"\n')
    numactl.chmod(0o755)
    monkeypatch.setattr(spawn, "_python_exe", os.fsencode(numactl))
    process = start((tmp_path / "out").write_bytes, b"written")
    process.join(WAIT_SECONDS)
    assert (process.exitcode, (tmp_path / "out").read_bytes()) == (0, b"written")
    assert (tmp_path / "bound").read_text() == "bound\n"
