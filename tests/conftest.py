"""Fixtures and rules for all layers of the tests."""

import os
from pathlib import Path

import pytest

from yuan_grpc.server.settings import DEMO

SHARED = Path(__file__).parents[2] / "shared" / "data"
WAIT_SECONDS = 60
"""Timeout of a test without an engine, unless it has its own."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give tests without an engine a shorter timeout, and run them last: they fill the time of the other process."""
    items.sort(key=lambda item: item.get_closest_marker("engine") is None)
    for item in items:
        if not item.get_closest_marker("engine") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(WAIT_SECONDS))


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the history of chats out of the home of the person who runs the tests."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="session")
def demo() -> Path:
    """Folder of the embedded checkpoint."""
    return Path(DEMO)


@pytest.fixture(scope="session")
def published() -> Path:
    """Folder with the published tokenizer and its golden cases, which the repository does not contain."""
    if not SHARED.is_dir():
        pytest.skip("the published tokenizer is missing: no shared/data next to the checkout")
    return SHARED
