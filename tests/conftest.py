"""What several layers of the suite share."""

from pathlib import Path

import pytest

from yuan_grpc.server.settings import DEMO

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def demo() -> Path:
    """The embedded checkpoint's folder."""
    return Path(DEMO)


@pytest.fixture(scope="session")
def published() -> Path:
    """The folder with the published tokenizer and its golden cases, which are not ours to ship."""
    if not SHARED.is_dir():
        pytest.skip("the published tokenizer is not here: shared/data beside the checkout")
    return SHARED
