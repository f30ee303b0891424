"""Bar charts as HTML. Labels are text and bars are SVG in percent, so that a chart fits every width and theme."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from yuan_grpc.humaneval.formatting import format_interval, format_percent
from yuan_grpc.humaneval.report.elements import element
from yuan_grpc.humaneval.report.statistics import Interval, LengthGroup

TICKS = (0, 25, 50, 75, 100)


@dataclass(frozen=True)
class Bar:
    """One row of a chart: a rate from 0 to 1."""

    label: str
    rate: float
    value: str
    """The rate as text, next to the bar."""
    interval: Interval | None = None
    """Interval shown as a line through the end of the bar."""
    kind: str = "own"
    """Class of the bar: `own`, `other` or `published`."""


def bar_chart(bars: Iterable[Bar], band: Interval | None = None) -> Element:
    """Return a chart from 0 to 100 %.

    Args:
        bars: the rows.
        band: an interval to shade in every row.
    """
    labels = (f"{tick} %" if tick == TICKS[-1] else f"{tick}" for tick in TICKS)
    ticks = (element("span", text, class_=f"tick t{tick}") for tick, text in zip(TICKS, labels, strict=True))
    axis = element("span", *ticks, class_="axis")
    axis_row = element("div", element("span", class_="label"), axis, element("span", class_="value"), class_="row")
    axis_row.set("aria-hidden", "true")
    return element("div", *(_row(bar, band) for bar in bars), axis_row, class_="chart")


def length_chart(groups: Sequence[LengthGroup]) -> Element:
    """Return a chart of the pass rate by length."""
    return bar_chart(
        Bar(
            f"{group.shortest}–{group.longest}" if group.shortest < group.longest else str(group.longest),
            group.rate.value,
            f"{100 * group.rate.value:.0f} % of {group.count}",
            group.rate,
        )
        for group in groups
    )


def _row(bar: Bar, band: Interval | None) -> Element:
    name = f"{bar.label}: {format_percent(bar.rate)}"
    if bar.interval:
        name += f", 95 % interval {format_interval(bar.interval.low, bar.interval.high)}"
    svg = element("svg", class_="bar", role="img", aria_label=name)
    svg.append(element("title", name))
    if band:
        svg.append(
            element("rect", class_="band", x=_percent(band.low), width=_percent(band.high - band.low), height="100%")
        )
    for tick in TICKS:
        svg.append(element("line", class_="grid", x1=f"{tick}%", x2=f"{tick}%", y1="0", y2="100%"))
    svg.append(element("rect", class_=f"fill {bar.kind}", y="20%", width=_percent(bar.rate), height="60%", rx="2"))
    if bar.interval:
        low, high = _percent(bar.interval.low), _percent(bar.interval.high)
        svg.append(element("line", class_="interval", x1=low, x2=high, y1="50%", y2="50%"))
        for x in (low, high):
            svg.append(element("line", class_="interval", x1=x, x2=x, y1="35%", y2="65%"))
    label = element("span", bar.label, class_="label")
    return element("div", label, svg, element("span", bar.value, class_="value"), class_="row")


def _percent(rate: float) -> str:
    return f"{100 * rate:.2f}%"
