"""Plots of a report: pass rate by prompt length, and failures by kind."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from yuan_grpc.humaneval.report.statistics import group_by_length

MAX_KINDS = 8
COLORS = {"rules": "#1f6feb", "plain": "#d29922"}


class PlotError(RuntimeError):
    """Missing plotting support; the message says what to install."""


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
    """Draw each group from its shortest to its longest prompt, on an axis of tokens, with the interval of its rate."""
    for i, (name, values) in enumerate(rates.items()):
        groups = group_by_length(values)
        for j, group in enumerate(groups):
            rate, color, label = group.rate, COLORS.get(name), name if not j else None
            ends, position = (group.shortest, group.longest), (group.shortest + group.longest) / 2 + 2 * i
            axes.plot(ends, [100 * rate.value] * 2, color=color, label=label, linewidth=6 - 3 * i)
            axes.plot([position] * 2, [100 * rate.low, 100 * rate.high], color=color, linewidth=1, alpha=0.6)
    axes.set(title="pass rate by length", xlabel="prompt tokens", ylabel="%", ylim=(0, 100), xlim=(0, None))
    axes.set_yticks(range(0, 101, 25))
    axes.grid(axis="y", linewidth=0.5, alpha=0.5)
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
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.invert_yaxis()
