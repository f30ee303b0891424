"""Plots of a report: pass rate by prompt length, and failures by kind."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

MAX_GROUPS = 8
MAX_KINDS = 8
COLORS = {"rules": "#1f6feb", "plain": "#d29922"}


class PlotError(RuntimeError):
    """Missing plotting support; the message says what to install."""


def group_by_length(values: Sequence[tuple[int, float]], groups: int = MAX_GROUPS) -> list[tuple[int, int, float]]:
    """Split (length, rate) pairs, sorted by length, into groups of about equal size.

    Returns:
        The shortest length, the longest length and the mean rate of each group.
    """
    ordered = sorted(values)
    count = max(1, min(groups, len(ordered)))
    bounds = [round(i * len(ordered) / count) for i in range(count + 1)]
    parts = [ordered[a:b] for a, b in pairwise(bounds) if b > a]
    return [(part[0][0], part[-1][0], sum(rate for _, rate in part) / len(part)) for part in parts]


def draw_svg(rates: Mapping[str, Sequence[tuple[int, float]]], kinds: Mapping[str, Mapping[str, int]]) -> str:
    """Return an SVG with each extraction's pass rate by prompt length, and its failures by kind.

    Args:
        rates: (prompt tokens, pass rate) of each task, by extraction.
        kinds: number of samples of each kind of verdict, by extraction.

    Raises:
        PlotError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError(
            "the plot needs matplotlib, which is not installed: pip install 'yuan-grpc[humaneval]', or use --no-plot"
        ) from error
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_length, by_kind = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_rates(by_length, rates)
    _draw_kinds(by_kind, kinds)
    svg = io.StringIO()
    # A fixed salt for IDs and no date: equal reports are equal files.
    with rc_context({"svg.hashsalt": "yuan"}):
        figure.savefig(svg, format="svg", metadata={"Date": None})
    text = svg.getvalue()
    return text[text.index("<svg") :]


def _draw_rates(axes: Any, rates: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    width = 0.8 / max(len(rates), 1)
    for i, (name, values) in enumerate(rates.items()):
        groups = group_by_length(values)
        positions = [position + i * width for position in range(len(groups))]
        bars = axes.bar(positions, [100 * rate for *_, rate in groups], width, label=name, color=COLORS.get(name))
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
        centers = [position + width * (len(rates) - 1) / 2 for position in range(len(groups))]
        labels = [f"{shortest}-{longest}" for shortest, longest, _ in groups]
        axes.set_xticks(centers, labels, rotation=30, fontsize=7)
    axes.set(title="pass rate by length", xlabel="prompt tokens", ylabel="%", ylim=(0, 108))
    axes.legend(frameon=False, fontsize=8)


def _draw_kinds(axes: Any, kinds: Mapping[str, Mapping[str, int]]) -> None:
    totals: Counter[str] = Counter()
    for counts in kinds.values():
        totals.update({kind: count for kind, count in counts.items() if kind != "passed"})
    names = [kind for kind, _ in totals.most_common(MAX_KINDS)]
    height = 0.8 / max(len(kinds), 1)
    for i, (name, counts) in enumerate(kinds.items()):
        positions = [position + i * height for position in range(len(names))]
        bars = axes.barh(positions, [counts.get(kind, 0) for kind in names], height, color=COLORS.get(name))
        axes.bar_label(bars, fontsize=7)
    centers = [position + height * (len(kinds) - 1) / 2 for position in range(len(names))]
    axes.set_yticks(centers, names, fontsize=7, parse_math=False)  # exception names come from generated programs
    axes.set(title="failures", xlabel="samples")
    axes.invert_yaxis()
