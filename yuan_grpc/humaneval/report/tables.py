"""Tables of the report, which Markdown and HTML share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, median

from yuan_grpc.humaneval.formatting import format_duration, format_interval, format_percent, format_points
from yuan_grpc.humaneval.generation import describe_request
from yuan_grpc.humaneval.pass_at_k import PUBLISHED
from yuan_grpc.humaneval.records import Record, hash_prompts
from yuan_grpc.humaneval.report.comparison import (
    Comparison,
    find_published,
    has_other_tasks,
    is_comparable,
    list_deviations,
)
from yuan_grpc.humaneval.report.scored_run import ScoredRun

PUBLISHED_NOTE = "pass@1 of the models, with extraction by the rules."


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


def build_sections(scored: ScoredRun, comparison: Comparison | None, *, plot: bool) -> list[Section]:
    """Return the sections of the report in Markdown, in order."""
    return [
        Section("HumanEval", [describe_headline(scored), *list_deviations(scored)]),
        Section("Scores", _notes(), rates_table(scored)),
        *([] if has_other_tasks(scored) else [Section("Published", [PUBLISHED_NOTE], published_table(scored))]),
        *([Section("Compared with the baseline", [], comparison_table(comparison))] if comparison else []),
        *([Section("Pass rate by prompt length, and failures", plot=True)] if plot else []),
        Section("Verdicts", table=kinds_table(scored)),
        Section("Finish reasons", table=finish_table(scored.records)),
        Section("Tokens and time", table=cost_table(scored.records)),
        Section("Tasks with failed samples", table=failed_table(scored)),
        Section("Run", [describe_samples(scored)], run_table(scored)),
    ]


def describe_headline(scored: ScoredRun) -> str:
    """Return the headline as a sentence, and how it relates to the published score."""
    rate = scored.headline
    text = f"pass@1 is {format_percent(rate.value)} (95 % interval {format_interval(rate.low, rate.high)})."
    return f"{text} {published}" if (published := describe_published(scored)) else text


def describe_published(scored: ScoredRun) -> str:
    """Return how the headline relates to the published score of the same model; empty if there is none."""
    model = find_published(scored.name)
    if not model or not is_comparable(scored):
        return ""
    rate, published = scored.headline, PUBLISHED[model]
    position = "inside" if published in rate else "outside"
    return (
        f"The published {format_percent(published)} of {model} is {position} this interval; the difference is "
        f"{format_points(rate.value - published)} points."
    )


def describe_samples(scored: ScoredRun) -> str:
    """Return the number of samples, and how they were run."""
    run, scores = scored.run, scored.scores
    isolation = "in a sandbox" if scores["isolated"] else "WITHOUT ISOLATION"
    return (
        f"{len(scored.records)} of {len(run.prompts) * run.samples} samples of {len(run.prompts)} tasks, run "
        f"{isolation} with a time limit of {scores['seconds']:g} s each."
    )


def run_table(scored: ScoredRun) -> Table:
    """Return the settings of the run."""
    run = scored.run
    rows = [[name, str(value)] for name, value in run.model.items() if value]
    rows += [["request", describe_request(run)], ["samples per task", str(run.samples)]]
    rows += [["seeds", "none: greedy" if run.seed is None else f"{run.seed} to {run.seed + run.samples - 1}"]]
    rows += [["Python", str(scored.scores["python"])]]
    rows += [["prompts", f"{run.prompts_file}, SHA-256 {hash_prompts(run.prompts)}"], ["started", run.started]]
    return Table(("run", ""), rows)


def _notes() -> list[str]:
    return [
        "The extraction `rules` is that of the published evaluation, `plain` a cut at the first closing fence. "
        "The interval of 95 % is over the choice of tasks.",
    ]


def rates_table(scored: ScoredRun) -> Table:
    """Return pass@k and the interval of pass@1, by extraction."""
    ks = sorted({int(k) for scores in scored.extractions.values() for k in scores["pass@"]} - {1})
    rows = []
    for name, scores in scored.extractions.items():
        counts = scores["tasks"].values()
        passed = f"{sum(p for _, p in counts)} of {sum(c for c, _ in counts)}"
        rate = scored.rates[name]
        higher = [format_percent(scores["pass@"][str(k)]) for k in ks]
        rows.append([name, format_percent(rate.value), format_interval(rate.low, rate.high), *higher, passed])
    return Table(("extraction", "pass@1", "95 % interval", *(f"pass@{k}" for k in ks), "samples that passed"), rows)


def published_table(scored: ScoredRun) -> Table:
    """Return the published scores and the differences of the run from them."""
    rate, comparable = scored.headline.value, is_comparable(scored)
    return Table(
        ("model", "pass@1", "this run"),
        [
            [
                name,
                format_percent(published),
                f"{format_points(rate - published)} points" if comparable else "incomplete",
            ]
            for name, published in PUBLISHED.items()
        ],
    )


def comparison_table(comparison: Comparison) -> Table:
    """Return the difference from the baseline."""
    difference = comparison.difference
    interval = f"{format_points(difference.low)} to {format_points(difference.high)} points"
    rows = [
        ["baseline", comparison.name],
        ["tasks of both", str(comparison.tasks)],
        ["score of the baseline on these", format_percent(comparison.rate)],
        ["difference", f"{format_points(difference.value)} points"],
        ["95 % interval", interval],
        ["better", ", ".join(comparison.better) or "none"],
        ["worse", ", ".join(comparison.worse) or "none"],
    ]
    return Table(("compared with", ""), rows)


def kinds_table(scored: ScoredRun) -> Table:
    """Return the number of samples of each kind of verdict, by extraction."""
    kinds: Counter[str] = Counter()
    for scores in scored.extractions.values():
        kinds.update(scores["kinds"])
    rows = [
        [kind, *(str(scores["kinds"].get(kind, 0)) for scores in scored.extractions.values())]
        for kind, _ in sorted(kinds.items(), key=lambda item: (item[0] != "passed", -item[1], item[0]))
    ]
    return Table(("kind", *scored.extractions), rows)


def finish_table(records: Iterable[Record]) -> Table:
    """Return the number of samples by finish reason."""
    counts = Counter(map(describe_finish, records)).most_common()
    return Table(("finish reason", "samples"), [[reason, str(count)] for reason, count in counts])


def describe_finish(record: Record) -> str:
    """Return the finish reason with the stop string or token, or the error."""
    if record.error:
        return f"error: {record.error['code']}"
    if record.stop_token_id is not None:
        return f"{record.finish_reason}: token {record.stop_token_id}"
    return f"{record.finish_reason}: {record.stop_string}" if record.stop_string else str(record.finish_reason)


def cost_table(records: Sequence[Record]) -> Table:
    """Return the tokens and the time of the samples."""
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


def failed_table(scored: ScoredRun) -> Table:
    """Return the tasks with failed samples."""
    names = list(scored.extractions)
    tasks = [scored.extractions[name]["tasks"] for name in names]
    rows = []
    for task_id in scored.run.prompts:
        counts = [task.get(task_id, (0, 0)) for task in tasks]
        if any(passed < count for count, passed in counts):
            rows.append([task_id, *(f"{passed} of {count}" for count, passed in counts)])
    return Table(("task", *(f"{name}: passed" for name in names)), rows)
