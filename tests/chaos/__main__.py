"""Breaks servers, and prints the account of all calls: `python tests/chaos [--scale S] [NAME ...]`.

Without names, plays all scenarios. The status is 1 if a rule did not hold.
"""

import argparse
import asyncio
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from chaos.account import FINISHED, LEFT, NOTHING, Run
from chaos.scenarios import ALL, Scenario

FILES = 8192
"""Open files that the clients of the largest scenario need, with a reserve; servers inherit the limit."""
HEADER = f"| scenario | sent | {FINISHED} | {LEFT} | errors | {NOTHING} | seconds | measured |"


async def play(scenario: Scenario, scale: float) -> Run:
    """Play a scenario and return its account. Another account would not add up."""
    with TemporaryDirectory() as folder:
        run = Run(scale, Path(folder))
        await scenario(run)
        return run


def main(arguments: Sequence[str]) -> int:
    """Play scenarios; print a line for each, and the rules that did not hold."""
    parser = argparse.ArgumentParser(prog="python tests/chaos", description="Break servers, and account for all calls.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ALL)} (default: all)")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the numbers of clients and calls")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - ALL.keys():
        parser.error(f"NAME must be one of {', '.join(ALL)}, not {', '.join(sorted(unknown))}")
    _allow_open_files()
    print(HEADER, "| --- " * HEADER.count(" | ") + "| --- |", sep="\n", flush=True)
    broken = [rule for name in options.names or ALL for rule in _play_and_print(name, options.scale)]
    print(*broken, sep="\n", file=sys.stderr)
    return 1 if broken else 0


def _allow_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FILES:
        allowed = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def _play_and_print(name: str, scale: float) -> list[str]:
    start = time.monotonic()
    run = asyncio.run(play(ALL[name], scale))
    ends = dict(run.outcomes)
    finished, left, nothing = (f"{ends.pop(end, 0):,}" for end in (FINISHED, LEFT, NOTHING))
    errors = ", ".join(f"{count:,} {code}" for code, count in sorted(ends.items()))
    seconds = f"{time.monotonic() - start:.0f}"
    print("|", " | ".join([name, f"{run.sent:,}", finished, left, errors, nothing, seconds, "; ".join(run.facts)]), "|")
    sys.stdout.flush()
    return [f"BROKEN {name}: must hold: {rule}" for rule in run.broken]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
