"""The report as one self-contained HTML page without scripts."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

from yuan_grpc.humaneval.formatting import escape_invisible, format_interval, format_percent, format_points
from yuan_grpc.humaneval.pass_at_k import PUBLISHED
from yuan_grpc.humaneval.report import tables
from yuan_grpc.humaneval.report.charts import Bar, bar_chart, length_chart
from yuan_grpc.humaneval.report.comparison import (
    Comparison,
    find_published,
    has_other_tasks,
    is_comparable,
    list_deviations,
)
from yuan_grpc.humaneval.report.elements import Child, element, extend, serialize
from yuan_grpc.humaneval.report.failures import FailedTask, Failure, list_failed_tasks, split_lines
from yuan_grpc.humaneval.report.scored_run import HEADLINE, ScoredRun
from yuan_grpc.humaneval.report.statistics import group_by_length

STYLE = Path(__file__).with_name("style.css").read_text("utf-8")
MAX_PROGRAMS = 3
"""Maximum number of programs shown per task."""
MAX_CHARACTERS = 20_000
"""Maximum length of a text shown in full."""


def render_page(scored: ScoredRun, comparison: Comparison | None = None) -> str:
    """Return the report as HTML. Text of the model and of programs is escaped, and a policy forbids all content but
    the page's own style."""
    title = f"HumanEval: {scored.name}"
    body = element("body", element("h1", title), *_headline(scored))
    extend(body, _scores(scored, comparison))
    if comparison:
        extend(body, _changes(scored, comparison))
    extend(body, _lengths(scored))
    extend(body, _failed_tasks(scored))
    extend(body, _heading("Verdicts", _table(tables.kinds_table(scored))))
    extend(body, _heading("Finish reasons", _table(tables.finish_table(scored.records))))
    extend(body, _heading("Tokens and time", _table(tables.cost_table(scored.records))))
    extend(body, _heading("Run", element("p", tables.describe_samples(scored)), _table(tables.run_table(scored))))
    return serialize(element("html", _head(title), body, lang="en"))


def _head(title: str) -> Element:
    style = element("style")
    style.text = STYLE
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", title),
        style,
    )


def _heading(text: str, *content: Child) -> list[Child]:
    return [element("h2", text), *content]


def _headline(scored: ScoredRun) -> list[Child]:
    rate = scored.headline
    number = element(
        "p",
        format_percent(rate.value),
        element("small", f"pass@1, 95 % interval {format_interval(rate.low, rate.high)}"),
        class_="headline",
    )
    parts: list[Child] = [number, element("p", _describe_counts(scored), class_="soft")]
    if published := tables.describe_published(scored):
        parts.append(element("p", published))
    if deviations := list_deviations(scored):
        parts.append(element("ul", *(element("li", text) for text in deviations), class_="notes"))
    return parts


def _describe_counts(scored: ScoredRun) -> str:
    counts = scored.extractions[HEADLINE]["tasks"].values()
    samples, passed = sum(count for count, _ in counts), sum(passed for _, passed in counts)
    text = f"{passed} of {samples} samples of {len(counts)} tasks passed, with the published extraction"
    higher = [
        f"pass@{k} {format_percent(rate)}" for k, rate in scored.extractions[HEADLINE]["pass@"].items() if k != "1"
    ]
    return f"{text}. {', '.join(higher)}." if higher else f"{text}."


def _scores(scored: ScoredRun, comparison: Comparison | None) -> list[Child]:
    bars = [
        Bar(f"this run, {name}", rate.value, format_percent(rate.value), rate, "own" if name == HEADLINE else "other")
        for name, rate in scored.rates.items()
    ]
    if comparison:
        bars.append(
            Bar(f"baseline, {comparison.name}", comparison.rate, format_percent(comparison.rate), None, "other")
        )
    published = [] if has_other_tasks(scored) else _published_bars(scored)
    note = (
        "`rules` is the extraction of the published evaluation, `plain` a cut at the first closing fence. "
        "The shaded band is the 95 % interval of this run over the choice of tasks"
        + ("; in parentheses is this run minus the published score, in points." if is_comparable(scored) else ".")
    )
    chart = bar_chart([*bars, *published], scored.headline)
    table = [_table(tables.rates_table(scored))] if scored.run.samples > 1 else []
    title = "Next to the published scores" if published else "Scores"
    return _heading(title, element("p", *_code(note), class_="soft"), chart, *table)


def _published_bars(scored: ScoredRun) -> list[Bar]:
    same, bars = find_published(scored.name), []
    for model, published in PUBLISHED.items():
        difference = f" ({format_points(scored.headline.value - published)})"
        value = format_percent(published) + (difference if is_comparable(scored) else "")
        bars.append(Bar(f"{model} (this model)" if model == same else model, published, value, None, "published"))
    return bars


def _code(text: str) -> list[Child]:
    """Return text whose parts in backticks are code."""
    return [element("code", part) if i % 2 else part for i, part in enumerate(text.split("`"))]


def _changes(scored: ScoredRun, comparison: Comparison) -> list[Child]:
    difference = comparison.difference
    verdict = "may be chance" if 0.0 in difference else "is larger than chance explains"
    text = (
        f"{format_points(difference.value)} points on the {comparison.tasks} tasks of both "
        f"(95 % interval {format_points(difference.low)} to {format_points(difference.high)}), which {verdict}."
    )
    positions = {task.task_id: task.position for task in list_failed_tasks(scored)} if scored.samples else {}
    parts = _heading(f"Compared with {escape_invisible(comparison.name)}", element("p", text))
    for name, task_ids in (("Better", comparison.better), ("Worse", comparison.worse)):
        tasks = [part for task_id in task_ids for part in (" ", _link(task_id, positions.get(task_id)))]
        parts.append(element("p", element("b", f"{name} ({len(task_ids)}):"), *tasks))
    return parts


def _link(task_id: str, position: int | None) -> Child:
    """Return a link to a failed task, or the name of a task that passed."""
    name = escape_invisible(task_id)
    return name if position is None else element("a", name, href=f"#task-{position}")


def _lengths(scored: ScoredRun) -> list[Child]:
    tokens = {record.task_id: record.prompt_tokens for record in scored.records if not record.error}
    rates = scored.task_rates()
    by_prompt = group_by_length((tokens[task_id], rate) for task_id, rate in rates.items() if task_id in tokens)
    generated = [
        (sample.record.completion_tokens, float(sample.passed))
        for sample in scored.samples
        if sample.extraction == HEADLINE and not sample.record.error
    ]
    parts: list[Child] = []
    for name, groups in (
        ("By prompt tokens", by_prompt),
        ("By generated tokens", group_by_length(generated)),
    ):
        if groups:
            parts += [element("h3", name), _mark_short(length_chart(groups))]
    note = (
        "Groups of about equal size, each with its number of tasks or samples. The lines are 95 % intervals; rates "
        "with overlapping intervals may differ by chance."
    )
    return _heading("Pass rate by length", element("p", note, class_="soft"), *parts) if parts else []


def _mark_short(chart: Element) -> Element:
    chart.set("class", "chart short")
    return chart


def _failed_tasks(scored: ScoredRun) -> list[Child]:
    tasks = list_failed_tasks(scored)
    parts = _heading(f"Failed tasks ({len(tasks)} of {len(scored.run.prompts)})")
    if not tasks:
        return [*parts, element("p", "All samples passed.")]
    if not scored.samples:
        note = "The scores do not include programs and tests. Run `yuan-grpc humaneval score` again to see them here."
        return [*parts, element("p", *_code(note)), _table(tables.failed_table(scored))]
    return [*parts, *(_task(scored, task) for task in tasks)]


def _task(scored: ScoredRun, task: FailedTask) -> Element:
    summary = element("summary", element("code", escape_invisible(task.task_id)))
    if task.failures:
        kind, message = _error(task.failures[0])
        extend(summary, [element("span", kind, class_="kind")])
        if message:
            extend(summary, [element("span", _shorten(message), class_="message")])
    extend(summary, [element("span", _describe_passed(task), class_="also")])
    shown = [_failure(failure) for failure in task.failures[:MAX_PROGRAMS]]
    body = element("div", *shown, class_="body", id=f"task-{task.position}")
    if (hidden := len(task.failures) - MAX_PROGRAMS) > 0:
        extend(body, [element("p", f"{hidden} more programs failed.", class_="soft")])
    extend(
        body,
        [_folded("Prompt", scored.run.prompts[task.task_id]), _folded("Tests", scored.tests.get(task.task_id, ""))],
    )
    return element("details", summary, body)


def _describe_passed(task: FailedTask) -> str:
    """Return the number of samples that passed, by extraction if it differs."""
    parts = {name: f"{passed} of {count}" for name, (count, passed) in task.passed.items() if passed}
    if parts and len(parts) == len(task.passed) and len(set(parts.values())) == 1:
        return f" {next(iter(parts.values()))} samples passed"
    return "".join(f" {name}: {part} passed" for name, part in parts.items())


def _failure(failure: Failure) -> Element:
    record, count = failure.first.record, len(failure.samples)
    others = f" and {count - 1} equal ones" if count > 1 else ""
    facts = (
        f"Fails with {' and '.join(failure.extractions)}. Sample {record.sample}{others}: "
        f"{record.completion_tokens} tokens, finish reason {tables.describe_finish(record)}."
    )
    program = element("div", element("p", facts, class_="soft"), class_="program")
    if failure.expectation:
        extend(program, [element("h3", "Expectation"), _pre(failure.expectation)])
    extend(program, [element("h3", "Error"), _pre(": ".join(filter(None, _error(failure))), "wrap")])
    if record.error:
        return program
    extend(program, [element("h3", "Code"), _code_block(failure.first.completion, failure.line)])
    extend(program, [_folded("Text as generated", record.text)])
    return program


def _error(failure: Failure) -> tuple[str, str]:
    """Return the kind and the message of an error, or the code and the message of a failed request."""
    record, kind = failure.first.record, failure.first.kind
    if record.error:
        return record.error.get("code", ""), record.error.get("message", "")
    message = failure.first.result.removeprefix("failed: ")
    return kind, "" if message == kind else message


def _code_block(source: str, line: int | None) -> Element:
    """Return a program without empty lines at the start, with the line of the exception marked."""
    lines = split_lines(_truncate(source))
    empty = next((i for i, text in enumerate(lines) if text.strip()), 0)
    lines, marked = lines[empty:], (line or 0) - empty
    if not 1 <= marked <= len(lines):
        return _pre("\n".join(lines))
    before, after = (
        "".join(f"{text}\n" for text in lines[: marked - 1]),
        "".join(f"\n{text}" for text in lines[marked:]),
    )
    return element("pre", before, element("mark", lines[marked - 1]), after)


def _folded(title: str, text: str) -> Element:
    return element("details", element("summary", title), _pre(text, "wrap"))


def _pre(text: str, class_: str = "") -> Element:
    # A parser drops one line feed after the tag.
    text = _truncate(text)
    return element("pre", f"\n{text}" if text.startswith("\n") else text, **({"class_": class_} if class_ else {}))


def _truncate(text: str) -> str:
    return (
        text
        if len(text) <= MAX_CHARACTERS
        else f"{text[:MAX_CHARACTERS]}\n… {len(text) - MAX_CHARACTERS} more characters"
    )


def _shorten(text: str, limit: int = 80) -> str:
    text = escape_invisible(text)
    return text if len(text) <= limit else f"{text[:limit]}…"


def _table(table: tables.Table) -> Element:
    head = element("tr", *_cells("th", table.headers))
    rows = [element("tr", *_cells("td", row)) for row in table.rows]
    return element("div", element("table", head, *rows), class_="scroll")


def _cells(tag: str, texts: Sequence[str] | Iterable[str]) -> list[Element]:
    return [element(tag, escape_invisible(text)) for text in texts]
