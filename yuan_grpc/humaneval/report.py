"""Report of a scored run, as Markdown and as one self-contained HTML file."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import mean, median
from typing import Any

from yuan_grpc.humaneval.dataset import ProblemError
from yuan_grpc.humaneval.formatting import escape_invisible, format_duration, format_percent
from yuan_grpc.humaneval.generation import describe_request
from yuan_grpc.humaneval.pass_at_k import PUBLISHED
from yuan_grpc.humaneval.plot import draw_svg
from yuan_grpc.humaneval.records import FILE, Record, Run, hash_prompts, hash_records, read
from yuan_grpc.humaneval.scoring import SCORES

MARKDOWN, HTML, PLOT = "report.md", "report.html", "plot.svg"
PLAIN = re.compile(r"(?:[^\W_]|[ ,%()=-]|(?<=\d)[.:](?=\d)|:(?= ))*")
"""Text that has no meaning in Markdown and contains no address that a renderer would make a link."""
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem;color:#1f2328}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{border:1px solid #d1d9e0;padding:.25rem .6rem;text-align:left}"
    "svg{max-width:100%;height:auto}"
)


@dataclass(frozen=True)
class Table:
    """A table: column headers, and rows with one cell per column."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A heading with paragraphs, a table and the plot, in this order."""

    heading: str
    paragraphs: Sequence[str] = ()
    table: Table | None = None
    plot: bool = False


@dataclass(frozen=True)
class ScoredRun:
    """A run with its samples and scores."""

    run: Run
    records: Sequence[Record]
    scores: dict[str, Any]

    @property
    def extractions(self) -> dict[str, dict[str, Any]]:
        """The scores by name of the extraction."""
        extractions: dict[str, dict[str, Any]] = self.scores["extractions"]
        return extractions


def read_samples(folder: Path) -> tuple[Run, list[Record]]:
    """Return a run and its samples.

    Raises:
        ProblemError: the run has no samples.
        RecordsError: the folder is not a run.
    """
    run, records = read(folder / FILE)
    if not records:
        raise ProblemError(f"{folder} has no samples: run `yuan-grpc humaneval generate {folder}` first")
    return run, records


def load(folder: Path) -> ScoredRun:
    """Read a scored run.

    Raises:
        ProblemError: the run is not scored, or has changed since it was scored.
    """
    run, records = read_samples(folder)
    scores = json.loads((folder / SCORES).read_text("utf-8")) if (folder / SCORES).exists() else {}
    if scores.get("samples") != hash_records(records):
        state = "has changed since it was scored" if scores else "is not scored yet"
        raise ProblemError(f"{folder} {state}: run `yuan-grpc humaneval score {folder}` first")
    return ScoredRun(run, records, scores)


def write(folder: Path, *, plot: bool = True) -> tuple[Path, ...]:
    """Write the report of a run into its folder and return the paths of the files.

    Raises:
        PlotError: matplotlib is not installed.
        ProblemError: the run is not scored, or has changed since it was scored.
    """
    scored = load(folder)
    kinds = {name: scores["kinds"] for name, scores in scored.extractions.items()}
    svg = draw_svg(rates_by_length(scored), kinds) if plot else ""
    sections = build_sections(scored, plot=plot)
    files = {MARKDOWN: render_markdown(sections), HTML: render_html(sections, svg)}
    if plot:
        files[PLOT] = svg
    for name, text in files.items():
        (folder / name).write_text(text, "utf-8")
    return tuple(folder / name for name in files)


def rates_by_length(scored: ScoredRun) -> dict[str, list[tuple[int, float]]]:
    """Return (prompt tokens, pass rate) of each task, by extraction."""
    tokens = {record.task_id: record.prompt_tokens for record in scored.records if not record.error}
    return {
        name: [
            (tokens[task_id], passed / count)
            for task_id, (count, passed) in scores["tasks"].items()
            if task_id in tokens
        ]
        for name, scores in scored.extractions.items()
    }


def build_sections(scored: ScoredRun, *, plot: bool) -> list[Section]:
    """Return the sections of the report, in order."""
    return [
        Section("HumanEval", [_summary(scored)], _run_table(scored)),
        Section("pass@k", _notes(scored), _rates_table(scored)),
        Section("Published", ["pass@1 of the published models, with extraction by the rules."], _published_table()),
        *([Section("Pass rate by prompt length, and failures", plot=True)] if plot else []),
        Section("Verdicts", table=_kinds_table(scored)),
        Section("Finish reasons", table=_finish_table(scored.records)),
        Section("Tokens and time", table=_cost_table(scored.records)),
        Section("Tasks with failed samples", table=_failed_table(scored)),
    ]


def render_markdown(sections: Iterable[Section]) -> str:
    """Return the report as Markdown, which refers to the plot as a file in the same folder."""
    parts = []
    for index, section in enumerate(sections):
        parts.append(f"{'##' if index else '#'} {section.heading}")
        parts += section.paragraphs
        if section.table:
            headers, *cells = ([*map(_markdown_cell, row)] for row in (section.table.headers, *section.table.rows))
            rows = [headers, ["---"] * len(headers), *cells]
            parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
        if section.plot:
            parts.append(f"![{section.heading}]({PLOT})")
    return "\n\n".join(parts) + "\n"


def _markdown_cell(text: str) -> str:
    """Return plain text as it is, and other text as code, in which Markdown, HTML, formulas and links mean nothing."""
    text = escape_invisible(text)
    if PLAIN.fullmatch(text):
        return text
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    padding = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{padding}{text}{padding}{fence}".replace("|", "\\|")


def render_html(sections: Iterable[Section], svg: str) -> str:
    """Return the report as one HTML file that includes the plot."""
    parts = [f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>HumanEval</title><style>{STYLE}</style>']
    for index, section in enumerate(sections):
        tag = "h2" if index else "h1"
        parts.append(f"<{tag}>{escape(section.heading)}</{tag}>")
        parts += [f"<p>{escape(paragraph)}</p>" for paragraph in section.paragraphs]
        if section.table:
            parts.append(_html_table(section.table))
        if section.plot:
            parts.append(svg)
    return "\n".join(parts) + "\n</html>\n"


def _html_table(table: Table) -> str:
    rows = [_html_row("th", table.headers), *(_html_row("td", row) for row in table.rows)]
    return "<table>\n" + "\n".join(rows) + "\n</table>"


def _html_row(tag: str, cells: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(escape_invisible(cell))}</{tag}>" for cell in cells) + "</tr>"


def _summary(scored: ScoredRun) -> str:
    run, scores = scored.run, scored.scores
    isolation = "in a sandbox" if scores["isolated"] else "WITHOUT ISOLATION"
    return (
        f"{len(scored.records)} of {len(run.prompts) * run.samples} samples of {len(run.prompts)} tasks, run "
        f"{isolation} with a time limit of {scores['seconds']:g} s each."
    )


def _run_table(scored: ScoredRun) -> Table:
    run = scored.run
    rows = [[name, str(value)] for name, value in run.model.items() if value]
    rows += [["request", describe_request(run)], ["samples per task", str(run.samples)]]
    rows += [["seeds", "none: greedy" if run.seed is None else f"{run.seed} to {run.seed + run.samples - 1}"]]
    rows += [["Python", str(scored.scores["python"])]]
    rows += [["prompts", f"{run.prompts_file}, SHA-256 {hash_prompts(run.prompts)}"], ["started", run.started]]
    return Table(("run", ""), rows)


def _notes(scored: ScoredRun) -> list[str]:
    failed = sum(1 for record in scored.records if record.error)
    return [
        "`rules` is the extraction of the published evaluation, `plain` a cut at the first closing fence.",
        *([f"{failed} samples have no text because their requests failed; they count as failed."] if failed else []),
    ]


def _rates_table(scored: ScoredRun) -> Table:
    ks = sorted({int(k) for scores in scored.extractions.values() for k in scores["pass@"]})
    rows = []
    for name, scores in scored.extractions.items():
        counts = scores["tasks"].values()
        passed = f"{sum(p for _, p in counts)} of {sum(c for c, _ in counts)}"
        rows.append([name, *(format_percent(scores["pass@"][str(k)]) for k in ks), passed])
    return Table(("extraction", *(f"pass@{k}" for k in ks), "samples that passed"), rows)


def _published_table() -> Table:
    return Table(("model", "pass@1"), [[name, format_percent(rate)] for name, rate in PUBLISHED.items()])


def _kinds_table(scored: ScoredRun) -> Table:
    kinds: Counter[str] = Counter()
    for scores in scored.extractions.values():
        kinds.update(scores["kinds"])
    rows = [
        [kind, *(str(scores["kinds"].get(kind, 0)) for scores in scored.extractions.values())]
        for kind, _ in sorted(kinds.items(), key=lambda item: (item[0] != "passed", -item[1], item[0]))
    ]
    return Table(("kind", *scored.extractions), rows)


def _finish_table(records: Iterable[Record]) -> Table:
    counts = Counter(map(_describe_finish, records)).most_common()
    return Table(("finish reason", "samples"), [[reason, str(count)] for reason, count in counts])


def _describe_finish(record: Record) -> str:
    if record.error:
        return f"error: {record.error['code']}"
    if record.stop_token_id is not None:
        return f"{record.finish_reason}: token {record.stop_token_id}"
    return f"{record.finish_reason}: {record.stop_string}" if record.stop_string else str(record.finish_reason)


def _cost_table(records: Sequence[Record]) -> Table:
    completed = [record for record in records if not record.error]
    headers = ("per sample", "total", "mean", "median", "maximum")
    if not completed:
        return Table(headers, [])
    rows = []
    for name, values in (
        ("prompt tokens", [float(record.prompt_tokens) for record in completed]),
        ("generated tokens", [float(record.completion_tokens) for record in completed]),
    ):
        rows.append([name, f"{sum(values):,.0f}", f"{mean(values):.1f}", f"{median(values):.0f}", f"{max(values):.0f}"])
    times = [record.seconds for record in completed]
    seconds = [f"{value:.2f} s" for value in (mean(times), median(times), max(times))]
    return Table(headers, [*rows, ["call duration", format_duration(sum(times)), *seconds]])


def _failed_table(scored: ScoredRun) -> Table:
    names = list(scored.extractions)
    tasks = [scored.extractions[name]["tasks"] for name in names]
    rows = []
    for task_id in scored.run.prompts:
        counts = [task.get(task_id, (0, 0)) for task in tasks]
        if any(passed < count for count, passed in counts):
            rows.append([task_id, *(f"{passed} of {count}" for count, passed in counts)])
    return Table(("task", *(f"{name}: passed" for name in names)), rows)
