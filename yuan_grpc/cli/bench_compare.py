"""`yuan-grpc bench compare`: two runs side by side."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from yuan_grpc.cli.common.errors import UsageError, handle_errors
from yuan_grpc.cli.common.terminal import BOLD, GREEN, RED, colorize, sanitize_line
from yuan_grpc.cli.load_generator import METRICS

NOTABLE = 0.05
"""Relative difference above which a ratio has a color."""
_WORKLOAD = ("model", "dtype", "prompt_tokens", "shared_prefix", "max_tokens")
_RATES = (
    ("requests/s", "requests_per_second"),
    ("tokens/s", "output_tokens_per_second"),
    ("goodput/s", "goodput_per_second"),
)
_LABEL_WIDTH, _VALUE_WIDTH, _RATIO_WIDTH = 24, 14, 9


def add_command(parser: argparse.ArgumentParser) -> None:
    """Add the command below `bench`."""
    actions = parser.add_subparsers(dest="action", title="compare", metavar="[compare A.json B.json]")
    compare = actions.add_parser(
        "compare",
        help="compare two runs, level by level",
        description="Print the results of two runs side by side, with the ratios of B to A.",
        allow_abbrev=False,
    )
    for name in ("a", "b"):
        compare.add_argument(name, type=Path, metavar=f"{name.upper()}.json", help="a file of bench --output or --json")
    compare.set_defaults(run=handle_errors(_run))


def _run(options: argparse.Namespace) -> int:
    paths = {"A": options.a, "B": options.b}
    runs = [_read(path) for path in paths.values()]
    for (name, path), run in zip(paths.items(), runs, strict=True):
        print(sanitize_line(f"{name}: {path} ({run['model']}, {run.get('date', 'no date')})"))
    for key in _WORKLOAD:
        first, second = (run.get(key) for run in runs)
        if first != second:
            print(sanitize_line(f"different {key}: {first} and {second}"))
    levels = [{_describe(level): level for level in run["levels"]} for run in runs]
    common = [name for name in levels[0] if name in levels[1]]
    if not common:
        raise UsageError(f"the runs must have a level in common, not {', '.join(levels[0])} and {', '.join(levels[1])}")
    for name in common:
        _print_level(name, levels[0][name], levels[1][name])
    return 0


def _read(path: Path) -> dict[str, Any]:
    try:
        run = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} must be JSON of bench: {error}") from None
    try:
        for level in run["levels"]:
            _describe(level), dict(_rows(level, level))
        return {**run, "model": str(run["model"])}
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UsageError(f"{path} must be JSON of bench, which has `model` and `levels`") from None


def _describe(level: dict[str, Any]) -> str:
    if "burstiness" in level:
        limit = f", at most {level['concurrency']} concurrent" if level["concurrency"] else ""
        burstiness = "inf" if level["burstiness"] is None else f"{level['burstiness']:g}"
        return f"{level['label']} requests/s, burstiness {burstiness}{limit}"
    return f"concurrency {level['concurrency']}"


def _print_level(name: str, first: dict[str, Any], second: dict[str, Any]) -> None:
    titles = (("A", _VALUE_WIDTH), ("B", _VALUE_WIDTH), ("B/A", _RATIO_WIDTH))
    print()
    print(colorize(sanitize_line(name), BOLD, sys.stdout))
    print(" " * _LABEL_WIDTH + "".join(title.rjust(width) for title, width in titles))
    for label, (a, b, higher_is_better) in _rows(first, second):
        ratio = f"{b / a:.2f}x" if a else "-"
        cell = ratio.rjust(_RATIO_WIDTH)
        if a and abs(b / a - 1) > NOTABLE:
            cell = colorize(cell, GREEN if (b > a) == higher_is_better else RED, sys.stdout)
        digits = 0 if label == "errors" else 2
        values = "".join(f"{value:>{_VALUE_WIDTH}.{digits}f}" for value in (a, b))
        print(f"  {label:<{_LABEL_WIDTH - 2}}{values}{cell}")


def _rows(first: dict[str, Any], second: dict[str, Any]) -> Iterator[tuple[str, tuple[float, float, bool]]]:
    """Yield the rows of a level: label, both values, and whether a higher one is better."""
    for label, key in _RATES:
        if key in first and key in second:
            yield label, (first[key], second[key], True)
    yield "errors", (sum(first["errors"].values()), sum(second["errors"].values()), False)
    for metric in METRICS:
        a, b = (level.get(f"{metric}_seconds", {}) for level in (first, second))
        for part in a:
            if a[part] is not None and b.get(part) is not None:
                yield f"{metric.upper()} {part} (ms)", (a[part] * 1000, b[part] * 1000, False)
