"""Plays what newcomers get wrong, and checks the last line and the exit status: `python tests/newcomer [NAME ...]`.

Without names, plays all cases; those that import vLLM take up to a minute each.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from newcomer.cases import CASES, Case
from newcomer.play import PREFIX, Result, play


def main(names: list[str]) -> int:
    """Play the cases; print a line for each, and return 1 if one ended otherwise than it must."""
    failed = 0
    for case in CASES:
        if not names or case.name in names:
            result = play(case)
            is_right = not result.could_be_played or ends_as_expected(case, result)
            failed += not is_right
            verdict = "ok" if is_right else "WRONG"
            skipped = "" if result.could_be_played else " (cannot be played on this machine)"
            print(f"{verdict:5} | {case.name} | {result.last_line}{skipped} | {result.status} | {result.seconds:.1f} s")
    return 1 if failed else 0


def ends_as_expected(case: Case, result: Result) -> bool:
    """Return whether last line and exit status are those of the case."""
    prefix = PREFIX if case.stop_signal else f"{PREFIX}cannot start: "
    return result.status == case.status and re.fullmatch(prefix + case.ending, result.last_line) is not None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
