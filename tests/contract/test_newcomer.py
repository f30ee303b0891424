"""The mistakes of newcomers that need no engine: each start ends with one line that names the cause."""

import pytest
from newcomer.__main__ import ends_as_expected
from newcomer.cases import CASES, Case
from newcomer.play import play

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES if not case.needs_engine])
def test_a_failed_start_ends_with_its_cause(case: Case) -> None:
    result = play(case)
    if not result.could_be_played:
        pytest.skip(f"not allowed on this machine: {result.last_line}")
    assert ends_as_expected(case, result), result
    assert result.lines == 1 or case.stop_signal
