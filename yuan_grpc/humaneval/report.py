"""The report of a run: Markdown, and one HTML file that needs no other."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import mean, median
from typing import Any

from yuan_grpc.humaneval.dataset import ProblemError
from yuan_grpc.humaneval.generation import request_of
from yuan_grpc.humaneval.pass_at_k import PUBLISHED
from yuan_grpc.humaneval.plot import drawn
from yuan_grpc.humaneval.progress import duration
from yuan_grpc.humaneval.records import FILE, Record, Run, digest, digest_of, read
from yuan_grpc.humaneval.scoring import SCORES

MARKDOWN, HTML, PLOT = "report.md", "report.html", "plot.svg"
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem;color:#1f2328}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{border:1px solid #d1d9e0;padding:.25rem .6rem;text-align:left}"
    "svg{max-width:100%;height:auto}"
)


@dataclass(frozen=True)
class Table:
    """A table: its heads, and rows of as many cells."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it: sentences, then a table, then the plot's place."""

    heading: str
    sentences: Sequence[str] = ()
    table: Table | None = None
    plot: bool = False


@dataclass(frozen=True)
class Measured:
    """A run with its samples and its scores."""

    run: Run
    records: Sequence[Record]
    scores: dict[str, Any]

    @property
    def extractions(self) -> dict[str, dict[str, Any]]:
        """The scores of each extraction, by its name."""
        found: dict[str, dict[str, Any]] = self.scores["extractions"]
        return found


def load(folder: Path) -> Measured:
    """Reads what is reported. Raises ProblemError where the run is not scored yet, or has changed since it was."""
    run, records = read(folder / FILE)
    scores = json.loads((folder / SCORES).read_text("utf-8")) if (folder / SCORES).exists() else {}
    if scores.get("samples") != digest_of(records):
        state = "has changed since it was scored" if scores else "is not scored yet"
        raise ProblemError(f"{folder} {state}: run `yuan-grpc humaneval score {folder}` first")
    return Measured(run, records, scores)


def write(folder: Path, *, plot: bool = True) -> tuple[Path, ...]:
    """Writes the report of a run into its folder and returns its files. Raises PlotError without matplotlib."""
    measured = load(folder)
    kinds = {name: one["kinds"] for name, one in measured.extractions.items()}
    svg = drawn(rates_by_length(measured), kinds) if plot else ""
    sections = sections_of(measured, plot=plot)
    written = {MARKDOWN: markdown(sections), HTML: html(sections, svg)}
    if plot:
        written[PLOT] = svg
    for name, text in written.items():
        (folder / name).write_text(text, "utf-8")
    return tuple(folder / name for name in written)


def rates_by_length(measured: Measured) -> dict[str, list[tuple[int, float]]]:
    """For each extraction the (prompt tokens, pass rate) of each task."""
    tokens = {record.task_id: record.prompt_tokens for record in measured.records if not record.error}
    return {
        name: [
            (tokens[task_id], passed / count) for task_id, (count, passed) in one["tasks"].items() if task_id in tokens
        ]
        for name, one in measured.extractions.items()
    }


def sections_of(measured: Measured, *, plot: bool) -> list[Section]:
    """The whole report, in order."""
    return [
        Section("HumanEval", [_what(measured)], _run_table(measured)),
        Section("pass@k", _remarks(measured), _rates_table(measured)),
        Section("Published", ["pass@1 of the published models, by the rules."], _published_table()),
        *([Section("Pass rate by length of the prompt, and failures", plot=True)] if plot else []),
        Section("What came of the samples", table=_kinds_table(measured)),
        Section("Finish reasons", table=_finish_table(measured.records)),
        Section("Tokens and time", table=_cost_table(measured.records)),
        Section("Tasks that did not pass", table=_failed_table(measured)),
    ]


def markdown(sections: Iterable[Section]) -> str:
    """The report in Markdown; its plot is a file beside it."""
    parts = []
    for level, section in enumerate(sections):
        parts.append(f"{'##' if level else '#'} {section.heading}")
        parts += section.sentences
        if section.table:
            rows = [section.table.heads, ["---"] * len(section.table.heads), *section.table.rows]
            parts.append("\n".join(f"| {' | '.join(map(_markdown_cell, row))} |" for row in rows))
        if section.plot:
            parts.append(f"![{section.heading}]({PLOT})")
    return "\n\n".join(parts) + "\n"


def _markdown_cell(text: str) -> str:
    """A cell on one line, in which nothing is a tag or another cell."""
    return escape(" ".join(text.split()), quote=False).replace("|", "\\|")


def html(sections: Iterable[Section], svg: str) -> str:
    """The report as one HTML file, with the plot in it."""
    parts = [f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>HumanEval</title><style>{STYLE}</style>']
    for level, section in enumerate(sections):
        tag = "h2" if level else "h1"
        parts.append(f"<{tag}>{escape(section.heading)}</{tag}>")
        parts += [f"<p>{escape(sentence)}</p>" for sentence in section.sentences]
        if section.table:
            parts.append(_html_table(section.table))
        if section.plot:
            parts.append(svg)
    return "\n".join(parts) + "\n</html>\n"


def _html_table(table: Table) -> str:
    rows = [_html_row("th", table.heads), *(_html_row("td", row) for row in table.rows)]
    return "<table>\n" + "\n".join(rows) + "\n</table>"


def _html_row(tag: str, cells: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _what(measured: Measured) -> str:
    run = measured.run
    asked = len(run.prompts) * run.samples
    return (
        f"{len(measured.records)} of {asked} samples of {len(run.prompts)} tasks, generated by {run.model['name']} and "
        f"run with Python {measured.scores['python']} for at most {measured.scores['seconds']:g} s each, "
        f"{'in a sandbox' if measured.scores['isolated'] else 'WITHOUT ISOLATION'}."
    )


def _run_table(measured: Measured) -> Table:
    run = measured.run
    rows = [[name, str(value)] for name, value in run.model.items() if value]
    rows += [["request", request_of(run)], ["samples of a task", str(run.samples)]]
    rows += [["seeds", "none: greedy" if run.seed is None else f"{run.seed} to {run.seed + run.samples - 1}"]]
    rows += [["prompts", f"{run.prompts_file}, SHA-256 {digest(run.prompts)}"], ["begun", run.started]]
    return Table(("run", ""), rows)


def _remarks(measured: Measured) -> list[str]:
    failed = sum(1 for record in measured.records if record.error)
    return [
        "`rules` is the published evaluation's extraction, `plain` a cut at the first closing fence.",
        *([f"{failed} samples have no text, for the server refused them; they count as failed."] if failed else []),
    ]


def _rates_table(measured: Measured) -> Table:
    ks = sorted({int(k) for one in measured.extractions.values() for k in one["pass@"]})
    rows = []
    for name, one in measured.extractions.items():
        counts = one["tasks"].values()
        passed = f"{sum(p for _, p in counts)} of {sum(c for c, _ in counts)}"
        rows.append([name, *(percent(one["pass@"][str(k)]) for k in ks), passed])
    return Table(("extraction", *(f"pass@{k}" for k in ks), "samples that passed"), rows)


def _published_table() -> Table:
    return Table(("model", "pass@1"), [[name, percent(rate)] for name, rate in PUBLISHED.items()])


def _kinds_table(measured: Measured) -> Table:
    kinds: Counter[str] = Counter()
    for one in measured.extractions.values():
        kinds.update(one["kinds"])
    rows = [
        [kind, *(str(one["kinds"].get(kind, 0)) for one in measured.extractions.values())]
        for kind, _ in sorted(kinds.items(), key=lambda item: (item[0] != "passed", -item[1], item[0]))
    ]
    return Table(("kind", *measured.extractions), rows)


def _finish_table(records: Iterable[Record]) -> Table:
    return Table(("finish", "samples"), [[why, str(n)] for why, n in Counter(map(_finish, records)).most_common()])


def _finish(record: Record) -> str:
    if record.error:
        return f"error: {record.error['code']}"
    if record.stop_token_id is not None:
        return f"{record.finish_reason}: token {record.stop_token_id}"
    return f"{record.finish_reason}: {record.stop_string}" if record.stop_string else str(record.finish_reason)


def _cost_table(records: Sequence[Record]) -> Table:
    done = [record for record in records if not record.error]
    if not done:
        return Table(("of a sample", ""), [])
    rows = []
    for name, values in (
        ("prompt tokens", [float(record.prompt_tokens) for record in done]),
        ("generated tokens", [float(record.completion_tokens) for record in done]),
    ):
        rows.append([name, f"{sum(values):,.0f}", f"{mean(values):.1f}", f"{median(values):.0f}", f"{max(values):.0f}"])
    times = [record.seconds for record in done]
    rows.append(
        [
            "time of a call",
            duration(sum(times)),
            f"{mean(times):.2f} s",
            f"{median(times):.2f} s",
            f"{max(times):.2f} s",
        ]
    )
    return Table(("", "in all", "mean", "median", "most"), rows)


def _failed_table(measured: Measured) -> Table:
    names = list(measured.extractions)
    tasks = [measured.extractions[name]["tasks"] for name in names]
    rows = []
    for task_id in measured.run.prompts:
        counts = [task.get(task_id, (0, 0)) for task in tasks]
        if any(passed < count for count, passed in counts):
            rows.append([task_id, *(f"{passed} of {count}" for count, passed in counts)])
    return Table(("task", *(f"{name}: passed" for name in names)), rows)


def percent(rate: float) -> str:
    """A rate with one decimal: `66.5 %`."""
    return f"{100 * rate:.1f} %"
