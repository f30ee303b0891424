"""The page of `yuan-grpc bench --output FILE.html`: charts as inline SVG and a table, in one file without scripts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from yuan_grpc.cli.load_generator import METRICS, PERCENTILES

WIDTH, HEIGHT, MARGIN = 360, 200, 44
"""Size of a chart and the space for its labels, in pixels."""
COLORS = ("#1f6feb", "#bf8700", "#cf222e")
STYLE = """\
:root{color-scheme:light dark;font:15px/1.5 system-ui,sans-serif}
body{max-width:76rem;margin:2rem auto;padding:0 1rem}
figure{display:inline-block;margin:0 1rem 1rem 0}
figcaption{font-weight:600}
svg{fill:currentColor;font:11px system-ui,sans-serif;max-width:100%}
.axis{stroke:currentColor;opacity:.25}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.2rem .6rem;text-align:right;border-bottom:1px solid #8884}
"""
TITLES = {
    "ttft": "Time to first token (ms)",
    "tpot": "Time per output token (ms)",
    "itl": "Time between tokens (ms)",
    "e2el": "Time of a call (ms)",
}
_CHARTS = (
    ("Tokens per second", (("output_tokens_per_second", None),), 1.0),
    *((title, tuple((f"{metric}_seconds", part) for part in PERCENTILES), 1000.0) for metric, title in TITLES.items()),
)
"""Title, series and factor of each chart. A series is a key of a level, and a key in it if it has several."""


def to_html(document: dict[str, Any]) -> str:
    """Return the results of a run as a page."""
    levels = document["levels"]
    title = f"{document['model']} ({document['dtype'] or 'unknown dtype'})"
    charts = "\n".join(_format_chart(name, levels, series, factor) for name, series, factor in _CHARTS)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}: benchmark</title><style>
{STYLE}</style></head><body>
<h1>{escape(title)}</h1>
<p>{escape(_describe(document))}</p>
{charts}
<div class="scroll">{_format_table(levels)}</div>
</body></html>
"""


def _describe(document: dict[str, Any]) -> str:
    load = "requests per second" if any("burstiness" in level for level in document["levels"]) else "concurrency"
    targets = " ".join(f"{metric}:{target:g}" for metric, target in document["goodput"].items())
    return (
        f"{document['address']}, {document['date']}. {document['prompt_tokens']} prompt tokens "
        f"({document['shared_prefix']} shared), {document['max_tokens']} generated. Levels: {load}."
        + (f" Goodput: requests with {targets} (ms)." if targets else "")
    )


def _format_chart(title: str, levels: Sequence[Any], series: Sequence[tuple[str, str | None]], factor: float) -> str:
    lines = [(part, [_value(level, key, part, factor) for level in levels]) for key, part in series]
    top = max((value for _, values in lines for value in values if value is not None), default=0.0) or 1.0
    parts = [_format_axes([level["label"] for level in levels], top)]
    for (name, values), color in zip(lines, COLORS, strict=False):
        parts.append(_format_series(name or title, values, top, color))
    legend = "".join(
        f'<text x="{MARGIN + 40 * number}" y="12" style="fill:{color}">{name}</text>'
        for number, ((name, _), color) in enumerate(zip(lines, COLORS, strict=False))
        if name
    )
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    image = f'<svg {size} role="img" aria-label="{escape(title)}">{"".join(parts)}{legend}</svg>'
    return f"<figure><figcaption>{escape(title)}</figcaption>{image}</figure>"


def _value(level: dict[str, Any], key: str, part: str | None, factor: float) -> float | None:
    value = level[key] if part is None else level[key][part]
    return None if value is None else value * factor


def _format_axes(labels: Sequence[str], top: float) -> str:
    parts = []
    for share in (0.0, 0.5, 1.0):
        y = _y(share * top, top)
        parts.append(f'<line class="axis" x1="{MARGIN}" x2="{WIDTH - 10}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{MARGIN - 4}" y="{y + 4:.1f}" text-anchor="end">{share * top:.4g}</text>')
    for number, label in enumerate(labels):
        x = _x(number, len(labels))
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(label)}</text>')
    return "".join(parts)


def _format_series(name: str, values: Sequence[float | None], top: float, color: str) -> str:
    points = [(_x(i, len(values)), _y(value, top), value) for i, value in enumerate(values) if value is not None]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}"><title>{escape(name)}: {value:.4g}</title></circle>'
        for x, y, value in points
    )
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>{dots}'


def _x(number: int, count: int) -> float:
    return MARGIN + (WIDTH - 10 - MARGIN) * (number + 0.5) / count


def _y(value: float, top: float) -> float:
    return HEIGHT - 22 - (HEIGHT - 44) * value / top


def _format_table(levels: Sequence[Any]) -> str:
    goodput = ["goodput/s"] if "goodput_per_second" in levels[0] else []
    names = ["level", "requests", "errors", "requests/s", "tokens/s", *goodput]
    names += [f"{metric.upper()} {part} (ms)" for metric in METRICS for part in PERCENTILES]
    rows = map(_format_row, levels)
    head = "".join(f"<th>{name}</th>" for name in names)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _format_row(level: dict[str, Any]) -> str:
    cells = [escape(level["label"]), str(level["requests"]), str(sum(level["errors"].values()))]
    rates = [level["requests_per_second"], level["output_tokens_per_second"], level.get("goodput_per_second")]
    cells += [f"{rate:.2f}" for rate in rates if rate is not None]
    values = [_value(level, f"{metric}_seconds", part, 1000) for metric in METRICS for part in PERCENTILES]
    cells += ["-" if value is None else f"{value:.2f}" for value in values]
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
