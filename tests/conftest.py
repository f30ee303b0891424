"""Fixtures and rules for all layers of the tests."""

import os
import signal
import sys
import time
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import grpc
import psutil
import pytest
from one_thread import set_one_thread
from xdist.scheduler import LoadGroupScheduling  # type: ignore[import-untyped]

set_one_thread()

SHARED = Path(__file__).parents[2] / "shared" / "data"
WAIT_SECONDS = 30
"""Timeout of a test without an engine, unless it has its own. The longest take 20 s on a machine five times slower."""

BOOT_TIME_ERROR = 1.0
"""Error of the start time of a process, in seconds: it is relative to the boot time, which the kernel rounds."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give tests without an engine a shorter timeout, and run them last: they fill the time of the other process.

    One of two processes runs all tests of the session's engine, so the other one never starts it.
    """
    items.sort(key=_order)
    for item in items:
        if not item.get_closest_marker("engine") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(WAIT_SECONDS))
        if "session_server" in _fixtures(item):
            item.add_marker(pytest.mark.xdist_group("session"))


class FileScheduling(LoadGroupScheduling):  # type: ignore[misc]
    """Gives a process whole files, whose fixtures it starts once, and all tests of a group."""

    def _split_scope(self, nodeid: str) -> str:
        scope: str = super()._split_scope(nodeid)
        return scope.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FileScheduling:
    """Return the scheduler of `-n 2 --dist loadgroup`."""
    return FileScheduling(config, log)


def _order(item: pytest.Item) -> tuple[bool, bool]:
    """Return the key of a test: the session's engine first, then other engines, then no engine."""
    return item.get_closest_marker("engine") is None, "session_server" not in _fixtures(item)


def _fixtures(item: pytest.Item) -> list[str]:
    fixtures: list[str] = getattr(item, "fixturenames", [])
    return fixtures


@pytest.hookimpl(wrapper=True)
def pytest_timeout_set_timer() -> Generator[None, Any, Any]:
    """Kill the processes of a test at its timeout, before it fails. It would otherwise wait for them to end."""
    result = yield
    fail, started = signal.getsignal(signal.SIGALRM), time.time()

    def end(number: int, frame: FrameType | None) -> None:
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if child.create_time() > started - BOOT_TIME_ERROR:
                    child.kill()
        assert callable(fail)
        fail(number, frame)

    signal.signal(signal.SIGALRM, end)
    return result


@pytest.fixture(scope="session", autouse=True)
def grpc_poller() -> None:
    """Keep the poller thread of gRPC: when its last user is collected, the collector may wait for it forever."""
    grpc.aio.init_grpc_aio()


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the history of chats out of the home of the person who runs the tests."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="session")
def demo() -> Path:
    """Folder of a checkpoint like the demo, with random weights instead of trained ones."""
    from random_checkpoint import random_checkpoint  # imports torch, which most tests do not need

    return random_checkpoint()


@pytest.fixture(scope="session")
def published() -> Path:
    """Folder with the published tokenizer and its golden cases, which the repository does not contain."""
    if not SHARED.is_dir():
        pytest.skip("the published tokenizer is missing: no shared/data next to the checkout")
    return SHARED


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the log of the newest server process to the report of a failed test."""
    report = yield
    if report.failed and (module := sys.modules.get("server_process")):
        report.sections.append(("log of the newest server", "".join(module.ServerProcess.newest_log[-200:])))
    return report
