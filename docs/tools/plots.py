"""The plots of the documentation, from the tables of benchmarks/results: `python docs/tools/plots.py`."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from drawing import ACCENT, FAINT, INK, PICTURES, SECOND, Drawing

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
COLORS = (SECOND, ACCENT, "#0f766e", "#b45309", "#7c3aed")
Series = Mapping[str, Sequence[float]]


def read_table(file: str, first_cell: str) -> list[list[str]]:
    """Return the rows of the first table of a report whose head begins with a cell, the head first."""
    lines = (RESULTS / file).read_text("utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first_cell} |"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        if not line.startswith("| ---"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def number(cell: str) -> float:
    """Return the first number of a cell, such as 1234 of `1,234 (0.9)`."""
    found = re.match(r"[\d,.]+", cell)
    return float(found[0].replace(",", "")) if found else 0.0


def grouped_bars(title: str, unit: str, groups: Sequence[str], series: Series) -> Drawing:
    """Return a plot with a group of bars for each entry, and the value above each bar."""
    names = list(series)
    bar, gap = 40, 34
    group_width = bar * len(names) + gap
    width = max(500, 60 + group_width * len(groups))
    picture = Drawing(width, 330, f"{title}, {unit}")
    picture.text(20, 28, title, anchor="start", bold=True)
    picture.text(20, 48, unit, anchor="start", size=12)
    for place, name in enumerate(names):
        picture.bar(20 + 150 * place, 60, 11, 11, COLORS[place])
        picture.text(36 + 150 * place, 70, name, anchor="start", size=12)
    top = max(max(values) for values in series.values())
    for index, group in enumerate(groups):
        left = 40 + group_width * index
        for place, name in enumerate(names):
            value = series[name][index]
            height = 180 * value / top
            picture.bar(left + bar * place, 285 - height, bar - 4, height, COLORS[place])
            if value:
                shown = f"{value:,.0f}" if value >= 100 else f"{value:g}"
                picture.text(left + bar * place + bar / 2 - 2, 279 - height, shown, size=10)
        picture.text(left + bar * len(names) / 2, 304, group, size=12)
    picture.parts.append(f"<line x1='30' y1='285.5' x2='{width - 20}' y2='285.5' stroke='{FAINT}'/>")
    picture.text(width - 20, 322, "benchmarks/results", anchor="end", size=10, color=INK)
    return picture


def model_speed(title: str, columns: Mapping[str, str]) -> Drawing:
    """Return a plot of Yuan and Llama, of some columns of the report."""
    head, *rows = read_table("2026-11-25-h100-model.md", "tokens/s")
    values = {row[0].capitalize(): [number(row[head.index(column)]) for column in columns] for row in rows[:2]}
    return grouped_bars(title, "tokens/s on one H100, 2B shape, bfloat16", list(columns.values()), values)


def streams() -> Drawing:
    """Return the plot of servers by number of streams."""
    names = {
        "offline": "engine alone",
        "yuan@4": "yuan-grpc",
        "vllm-http-4": "vLLM HTTP",
        "vllm-rust": "vLLM Rust",
        "vllm-grpc": "vLLM gRPC",
    }
    rows = {(row[0], row[1]): number(row[2]) for row in read_table("2026-11-27-h100-front-ends.md", "streams")}
    values = {label: [rows[(count, name)] for count in ("1", "64", "256")] for name, label in names.items()}
    return grouped_bars(
        "Streams over the network", "tokens/s on H100s, medians of three", ["1 stream", "64", "256"], values
    )


def latency() -> Drawing:
    """Return the plot of the time between tokens by number of front ends."""
    names = {"yuan, one front end (once)": "1 front end", "yuan@4": "4 front ends", "vllm-http-4": "vLLM, 4 processes"}
    rows = {row[1]: row[4] for row in read_table("2026-11-26-h100-front-ends.md", "streams") if row[0] == "64"}
    values = {label: [number(part) for part in rows[name].split(" / ")] for name, label in names.items()}
    return grouped_bars("Time between tokens, 64 streams", "ms on one H100", ["median", "99th percentile"], values)


def all_plots() -> dict[str, str]:
    """Return the file names and texts of the plots."""
    decode = {"decode 1": "batch 1", "64": "64", "256": "256"}
    prefill = {
        "prefill 1×1024": "1×1024",
        "1×2048": "1×2048",
        "1×4096": "1×4096",
        "64×1024": "64×1024",
        "16×4096": "16×4096",
    }
    drawings = {
        "decode": model_speed("Decoding", decode),
        "prefill": model_speed("Prefill", prefill),
        "streams": streams(),
        "latency": latency(),
    }
    return {f"{name}.svg": drawing.svg() for name, drawing in drawings.items()}


if __name__ == "__main__":
    for name, svg in all_plots().items():
        (PICTURES / name).write_text(svg, "utf-8")
