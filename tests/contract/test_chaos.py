"""The scenarios of `make chaos` that need no engine, with a twentieth of their clients and calls."""

from pathlib import Path

import pytest
from chaos.account import Run
from chaos.scenarios import WITHOUT_ENGINE, Scenario

pytestmark = pytest.mark.slow


@pytest.mark.timeout(120)
@pytest.mark.parametrize("scenario", WITHOUT_ENGINE.values(), ids=WITHOUT_ENGINE)
async def test_each_call_has_an_end_and_the_server_survives(scenario: Scenario, tmp_path: Path) -> None:
    run = Run(0.05, tmp_path)
    await scenario(run)
    assert not run.broken
    assert run.outcomes.total() == run.sent > 0
