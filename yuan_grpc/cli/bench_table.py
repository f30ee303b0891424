"""The table of `yuan-grpc bench`, for a terminal of 80 columns."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from yuan_grpc.cli.common.terminal import BOLD, colorize, sanitize_line
from yuan_grpc.cli.load_generator import PERCENTILES, Measurement, Workload, quantile
from yuan_grpc.client import Model

_COUNTS = (("conc", 4), ("reqs", 6), ("errs", 4), ("req/s", 7), ("tokens/s", 8))
_TIME_WIDTHS = (7, 6)
"""Titles and widths of the columns. A time has a column for each of PERCENTILES. A row has 78 characters."""


def print_header(options: argparse.Namespace, model: Model, workload: Workload) -> None:
    """Print the model, the workload and the titles of the columns."""
    print(sanitize_line(f"{model.name} ({model.dtype or 'unknown dtype'}) at {options.address}"))
    print(
        f"{workload.prompt_tokens} prompt tokens ({workload.shared_prefix} shared), "
        f"{workload.template.max_tokens} generated; --prompt-seed {workload.seed}"
    )
    for line in _format_titles(options):
        print(colorize(line, BOLD, sys.stdout), flush=True)


def format_level(level: Measurement, options: argparse.Namespace) -> str:
    """Return the rows of a level: two metrics in each, then the goodput and the errors."""
    first, *others = _pairs(options.percentile_metrics)
    lines = [" ".join([*_format_counts(level), *_format_times(level, first)])]
    lines += [" ".join([" " * _COUNTS_WIDTH, *_format_times(level, metrics)]) for metrics in others]
    if options.goodput:
        lines.append("     " + _format_goodput(level, options))
    if level.errors:
        lines.append("     errors: " + ", ".join(f"{count} {code}" for code, count in level.errors.most_common()))
    return "\n".join(lines)


def format_number(value: float, width: int) -> str:
    """Return the number with as many of two decimals as fit the width."""
    texts = (f"{value:.{digits}f}" for digits in (2, 1, 0))
    return next((text for text in texts if len(text) <= width), f"{value:.0f}").rjust(width)


_COUNTS_WIDTH = sum(width + 1 for _, width in _COUNTS) - 1


def _pairs(metrics: Sequence[str]) -> list[Sequence[str]]:
    return [metrics[start : start + 2] for start in range(0, len(metrics), 2)]


def _format_titles(options: argparse.Namespace) -> list[str]:
    names = [name.rjust(width) for name, width in _COUNTS]
    if not options.concurrency and (options.request_rate or options.ramp_up_strategy):
        names[0] = "rate".rjust(_COUNTS[0][1])
    lines, pairs = [], _pairs(options.percentile_metrics)
    for metrics in pairs:
        titles = [
            f"{metric.upper()} (ms)".rjust(len(PERCENTILES) * (width + 1) - 1)
            for metric, width in zip(metrics, _TIME_WIDTHS, strict=False)
        ]
        lines.append(" ".join([" " * _COUNTS_WIDTH, *titles]))
    for width in _TIME_WIDTHS[: len(pairs[0])]:
        names += [name.rjust(width) for name in PERCENTILES]
    return [*lines, " ".join(names)]


def _format_counts(level: Measurement) -> list[str]:
    values = (level.level.label, level.completed, sum(level.errors.values()))
    cells = [str(value).rjust(width) for value, (_, width) in zip(values, _COUNTS, strict=False)]
    rates = (level.requests_per_second, level.tokens_per_second)
    return cells + [format_number(rate, width) for rate, (_, width) in zip(rates, _COUNTS[3:], strict=True)]


def _format_times(level: Measurement, metrics: Sequence[str]) -> list[str]:
    cells = []
    for metric, width in zip(metrics, _TIME_WIDTHS, strict=False):
        times = level.times(metric)
        cells += [_format_milliseconds(quantile(times, fraction), width) for fraction in PERCENTILES.values()]
    return cells


def _format_milliseconds(seconds: float | None, width: int) -> str:
    return "-".rjust(width) if seconds is None else format_number(seconds * 1000, width)


def _format_goodput(level: Measurement, options: argparse.Namespace) -> str:
    good = level.good_requests(dict(options.goodput))
    share = good / level.completed if level.completed else 0.0
    targets = " ".join(f"{metric}:{target:g}" for metric, target in options.goodput)
    return f"goodput: {good / level.seconds:.2f} req/s, {share:.0%} of successful requests ({targets})"
