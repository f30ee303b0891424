"""Report of a scored run, as Markdown and as one self-contained HTML file."""

from __future__ import annotations

from pathlib import Path

from yuan_grpc.humaneval.report.comparison import compare
from yuan_grpc.humaneval.report.markdown import PLOT, render_markdown
from yuan_grpc.humaneval.report.page import render_page
from yuan_grpc.humaneval.report.plot import draw_svg
from yuan_grpc.humaneval.report.scored_run import ScoredRun, load, read_samples
from yuan_grpc.humaneval.report.tables import build_sections

__all__ = [
    "HTML",
    "MARKDOWN",
    "PLOT",
    "ScoredRun",
    "load",
    "read_samples",
    "write",
]
MARKDOWN, HTML = "report.md", "report.html"


def write(folder: Path, *, baseline: Path | None = None, plot: bool = True) -> tuple[Path, ...]:
    """Write the report of a run into its folder and return the paths of the files.

    Args:
        folder: the run.
        baseline: a run to compare it with.
        plot: whether to draw the plot of the Markdown file.

    Raises:
        PlotError: matplotlib is not installed.
        ProblemError: a run is not scored or has changed since it was scored, or the runs have no task in common.
        RecordsError: a folder is not a run.
    """
    scored = load(folder)
    comparison = compare(scored, load(baseline)) if baseline else None
    files = {
        MARKDOWN: render_markdown(build_sections(scored, comparison, plot=plot)),
        HTML: render_page(scored, comparison),
    }
    if plot:
        kinds = {name: scores["kinds"] for name, scores in scored.extractions.items()}
        files[PLOT] = draw_svg(rates_by_length(scored), kinds)
    for name, text in files.items():
        (folder / name).write_text(text, "utf-8")
    return tuple(folder / name for name in files)


def rates_by_length(scored: ScoredRun) -> dict[str, list[tuple[int, float]]]:
    """Return (prompt tokens, pass rate) of each task, by extraction."""
    tokens = {record.task_id: record.prompt_tokens for record in scored.records if not record.error}
    return {
        name: [(tokens[task_id], rate) for task_id, rate in scored.task_rates(name).items() if task_id in tokens]
        for name in scored.extractions
    }
