"""The plots of a report: how the pass rate depends on the length of a task, and what the failures were."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

GROUPS = 8
MOST_KINDS = 8
COLOURS = {"rules": "#1f6feb", "plain": "#d29922"}


class PlotError(RuntimeError):
    """Nothing can be drawn here; the message says what to install."""


def grouped(values: Sequence[tuple[int, float]], groups: int = GROUPS) -> list[tuple[int, int, float]]:
    """(shortest, longest, mean) of groups of about equal size, of (length, rate) in order of length."""
    ordered = sorted(values)
    count = max(1, min(groups, len(ordered)))
    bounds = [round(i * len(ordered) / count) for i in range(count + 1)]
    parts = [ordered[a:b] for a, b in pairwise(bounds) if b > a]
    return [(part[0][0], part[-1][0], sum(rate for _, rate in part) / len(part)) for part in parts]


def drawn(rates: Mapping[str, Sequence[tuple[int, float]]], kinds: Mapping[str, Mapping[str, int]]) -> str:
    """An SVG of each extraction's pass rate over the prompt's length, and of what its failures were.

    `rates` has (tokens, pass rate) of each task, `kinds` how many samples came to what, both by extraction. Raises
    PlotError where matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError(
            "a plot needs matplotlib, which is not installed: pip install 'yuan-grpc[humaneval]', or --no-plot"
        ) from error
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_length, by_kind = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_rates(by_length, rates)
    _draw_kinds(by_kind, kinds)
    svg = io.StringIO()
    # Without the date, and with ids that are not drawn by chance, equal reports are equal files.
    with rc_context({"svg.hashsalt": "yuan"}):
        figure.savefig(svg, format="svg", metadata={"Date": None})
    text = svg.getvalue()
    return text[text.index("<svg") :]


def _draw_rates(axes: Any, rates: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    width = 0.8 / max(len(rates), 1)
    for i, (name, values) in enumerate(rates.items()):
        groups = grouped(values)
        places = [place + i * width for place in range(len(groups))]
        bars = axes.bar(places, [100 * rate for *_, rate in groups], width, label=name, color=COLOURS.get(name))
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
        middles = [place + width * (len(rates) - 1) / 2 for place in range(len(groups))]
        spans = [f"{shortest}-{longest}" for shortest, longest, _ in groups]
        axes.set_xticks(middles, spans, rotation=30, fontsize=7)
    axes.set(title="pass rate by length", xlabel="tokens of the prompt", ylabel="%", ylim=(0, 108))
    axes.legend(frameon=False, fontsize=8)


def _draw_kinds(axes: Any, kinds: Mapping[str, Mapping[str, int]]) -> None:
    totals: Counter[str] = Counter()
    for counts in kinds.values():
        totals.update({kind: count for kind, count in counts.items() if kind != "passed"})
    names = [kind for kind, _ in totals.most_common(MOST_KINDS)]
    height = 0.8 / max(len(kinds), 1)
    for i, (name, counts) in enumerate(kinds.items()):
        places = [place + i * height for place in range(len(names))]
        bars = axes.barh(places, [counts.get(kind, 0) for kind in names], height, color=COLOURS.get(name))
        axes.bar_label(bars, fontsize=7)
    middles = [place + height * (len(kinds) - 1) / 2 for place in range(len(names))]
    axes.set_yticks(middles, names, fontsize=7, parse_math=False)  # a program may have called its exception anything
    axes.set(title="failures", xlabel="samples")
    axes.invert_yaxis()
