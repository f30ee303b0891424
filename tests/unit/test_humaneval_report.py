"""Statistics, comparison and rendering of the report."""

from __future__ import annotations

import pytest

from yuan_grpc.humaneval.dataset import ProblemError
from yuan_grpc.humaneval.formatting import format_duration
from yuan_grpc.humaneval.pass_at_k import PUBLISHED
from yuan_grpc.humaneval.records import Record, Run
from yuan_grpc.humaneval.report.comparison import compare, find_published, list_deviations
from yuan_grpc.humaneval.report.failures import find_statement, list_failed_tasks
from yuan_grpc.humaneval.report.markdown import render_markdown
from yuan_grpc.humaneval.report.page import render_page
from yuan_grpc.humaneval.report.plot import draw_svg
from yuan_grpc.humaneval.report.scored_run import ScoredRun, ScoredSample
from yuan_grpc.humaneval.report.statistics import group_by_length, paired_difference, pass_rate, wilson_interval
from yuan_grpc.humaneval.report.tables import Section, Table, describe_headline


def make_run(name: str = "yuan-2b", passed: int = 89, tasks: int = 164) -> ScoredRun:
    """Return a run with one sample per task of HumanEval, of which the first ones passed."""
    task_ids = [f"HumanEval/{i}" for i in range(tasks)]
    run = Run({"name": name, "dtype": "bfloat16"}, {"max_tokens": 512}, 1, None, dict.fromkeys(task_ids, "def f():"))
    counts = {task_id: (1, int(i < passed)) for i, task_id in enumerate(task_ids)}
    scores = {"pass@": {"1": passed / tasks}, "tasks": counts, "kinds": {"passed": passed}}
    records = [Record(task_id, 0, "x", "stop", prompt_tokens=10 + i) for i, task_id in enumerate(task_ids)]
    extractions = {"rules": scores, "plain": scores}
    return ScoredRun(run, records, {"extractions": extractions, "isolated": True, "seconds": 3.0, "python": "3.11"})


def test_durations_are_hours_minutes_and_seconds() -> None:
    assert [format_duration(s) for s in (0, 59.6, 3599, 36061)] == ["0:00", "1:00", "59:59", "10:01:01"]


def test_groups_by_length_have_about_equal_sizes_and_do_not_overlap() -> None:
    groups = group_by_length([(length, float(length % 2)) for length in range(20, 0, -1)])
    assert [(g.shortest, g.longest, g.count, g.rate.value) for g in groups] == [(1, 10, 10, 0.5), (11, 20, 10, 0.5)]
    groups = group_by_length([(length, 1.0) for length in (*[7] * 25, 8, *[9] * 14)])
    assert [(g.shortest, g.longest, g.count) for g in groups] == [(7, 7, 25), (8, 9, 15)]
    assert [(g.shortest, g.longest, g.count) for g in group_by_length([(1, 1.0), (5, 0.0)])] == [(1, 5, 2)]
    groups = group_by_length([(i, 1.0) for i in range(164)])
    assert {g.count for g in groups} == {20, 21}
    assert (len(groups), groups[-1].longest) == (8, 163)
    assert group_by_length([]) == []


def test_the_interval_of_one_sample_per_task_is_wilsons() -> None:
    assert wilson_interval(0.5, 10).low == pytest.approx(0.2366, abs=1e-4)
    rate = pass_rate([(1, 1)] * 89 + [(1, 0)] * 75)
    assert (rate.value, rate.low, rate.high) == pytest.approx((0.5427, 0.4662, 0.6172), abs=2e-4)
    assert (pass_rate([(1, 0)] * 10).low, pass_rate([(1, 1)] * 10).high) == pytest.approx((0, 1))
    assert 0.2 < pass_rate([(1, 0)] * 10).high < 0.4


def test_more_samples_of_a_task_narrow_the_interval() -> None:
    one, many = pass_rate([(1, 1), (1, 0)] * 50), pass_rate([(20, 12), (20, 8)] * 50)
    assert one.value == many.value == 0.5
    assert 0 < many.high - many.low < (one.high - one.low) / 2
    assert pass_rate([(2, 1)] * 50) == wilson_interval(0.5, 100)


def test_the_difference_of_two_runs_is_paired() -> None:
    difference = paired_difference([1.0] * 60 + [0.0] * 40, [1.0] * 50 + [0.0] * 50)
    assert difference.value == pytest.approx(0.1)
    assert 0.03 < difference.low < difference.high < 0.17  # an unpaired interval would reach below 0


def test_two_runs_are_compared_by_their_common_tasks() -> None:
    comparison = compare(make_run(passed=80), make_run("base", passed=50, tasks=100))
    assert (comparison.name, comparison.tasks, comparison.rate) == ("base", 100, 0.5)
    assert comparison.better == tuple(f"HumanEval/{i}" for i in range(50, 80))
    assert comparison.worse == ()
    other = make_run(tasks=1)
    other.scores["extractions"]["rules"]["tasks"] = {"other": (1, 1)}
    with pytest.raises(ProblemError, match="no task of this run"):
        compare(make_run(), other)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("Yuan2-2B-Janus-hf", "Yuan2.0-2B Janus"),
        ("/models/yuan2-2b-februa", "Yuan2.0-2B Februa"),
        ("yuan-2b", "Yuan2.0-2B"),
        ("Yuan2.0-102B", "Yuan2.0-102B"),
        ("yuan-51B-chat", "Yuan2.0-51B"),
        ("yuan-51b-janus", None),
        ("yuan-12b", None),
        ("yuan2", None),
        ("yuan-1.2b", None),
    ],
)
def test_a_served_name_is_matched_to_the_published_model(name: str, model: str | None) -> None:
    assert find_published(name) == model


def test_the_headline_says_whether_the_published_score_is_inside_its_interval() -> None:
    assert describe_headline(make_run()) == (
        "pass@1 is 54.3 % (95 % interval 46.6 to 61.7 %). The published 54.9 % of Yuan2.0-2B is inside this interval; "
        "the difference is −0.6 points."
    )
    assert "is outside this interval; the difference is +24.4 points" in describe_headline(make_run(passed=130))
    assert "published" not in describe_headline(make_run("other"))
    assert "published" not in describe_headline(make_run(tasks=100))


def test_deviations_from_the_published_evaluation_are_listed() -> None:
    assert list_deviations(make_run()) == ["The prompts are not the published ones."]
    scored = make_run(tasks=100)
    scored.scores["isolated"] = False
    run = Run(scored.run.model, {}, 2, 7, scored.run.prompts)
    records = [Record("HumanEval/0", 0, error={"code": "X", "message": ""}), Record("HumanEval/1", 0, "", "length")]
    assert list_deviations(ScoredRun(run, records, scored.scores)) == [
        "The tasks are not the 164 of HumanEval, so the published scores do not apply.",
        "The prompts are not the published ones.",
        "Decoding is sampled; the published scores are greedy.",
        "Missing: 198 of 200 samples.",
        "Failed requests, which count as failed samples: 1 of 2.",
        "Cut off at the token limit: 1 of 2 samples.",
        "Programs ran WITHOUT ISOLATION.",
    ]


def test_the_published_scores_are_in_the_page() -> None:
    page = render_page(make_run())
    assert "54.3 %" in page
    for name, rate in PUBLISHED.items():
        assert name in page
        assert f"{100 * rate:.1f} % (" in page
    assert "54.9 %</span>" in render_page(make_run(tasks=100, passed=50))  # incomplete: without the difference
    other = make_run(tasks=3, passed=1)
    other.run.prompts["other"] = ""
    assert "54.9 %" not in render_page(other)


TEST = """def check(candidate):
    assert candidate(1) == 2
    for x in (1, 2):
        assert candidate(
            x
        ) == x + 1
"""


@pytest.mark.parametrize(
    ("line", "statement"),
    [(2, "assert candidate(1) == 2"), (5, "assert candidate(\n            x\n        ) == x + 1"), (9, "")],
)
def test_the_expectation_is_the_statement_that_failed(line: int, statement: str) -> None:
    assert find_statement(TEST, line) == statement
    assert find_statement("def check(:\n    x", 2) == "x"


def test_equal_programs_of_a_task_are_one_failure_with_its_lines() -> None:
    scored = make_run(passed=0, tasks=1)
    code = "def f(x):\r\n    return 1 / 0"
    rows = [
        (0, "rules", code, "failed: division by zero", (7, 4, 2)),
        (0, "plain", f"{code}\n", "failed: division by zero", (8, 5, 2)),
        (1, "rules", code, "failed: division by zero", (7, 4, 2)),
        (1, "plain", code, "passed", ()),
        (2, "rules", code, "failed: division by zero", (7, 4, 2)),
        (2, "plain", code, "failed: division by zero", (7, 4, 2)),
        (3, "rules", "def f(:", "failed: invalid syntax (<string>, line 1)", ()),
    ]
    samples = [
        ScoredSample(Record("HumanEval/0", number), extraction, completion, result, "E", lines)
        for number, extraction, completion, result, lines in rows
    ]
    run = ScoredRun(scored.run, scored.records, scored.scores, samples, {"HumanEval/0": TEST})
    (task,) = list_failed_tasks(run)
    assert [(len(f.samples), f.extractions, f.expectation, f.line) for f in task.failures] == [
        (2, ("rules", "plain"), "assert candidate(1) == 2", 2),
        (1, ("rules",), "assert candidate(1) == 2", 2),
        (1, ("rules",), "", 1),
    ]


def test_a_failed_request_is_shown_instead_of_the_error_of_its_empty_program() -> None:
    scored = make_run(passed=0, tasks=1)
    record = Record("HumanEval/0", 0, error={"code": "INVALID_ARGUMENT", "message": "too long"})
    sample = ScoredSample(record, "rules", "", "failed: name 'f' is not defined", "NameError", (3,))
    page = render_page(ScoredRun(scored.run, [record], scored.scores, [sample], {"HumanEval/0": "check(f)"}))
    assert "INVALID_ARGUMENT: too long" in page
    assert "NameError" not in page


def test_a_changed_task_is_a_link_only_if_it_failed() -> None:
    scored, baseline = make_run(passed=2, tasks=4), make_run(passed=0, tasks=4)
    baseline.scores["extractions"]["rules"]["tasks"]["HumanEval/3"] = (1, 1)
    samples = [ScoredSample(record, "rules", "", "failed: ", "E", ()) for record in scored.records[2:]]
    scored = ScoredRun(scored.run, scored.records, scored.scores, samples)
    page = render_page(scored, compare(scored, baseline))
    assert "<b>Better (2):</b> HumanEval/0 HumanEval/1</p>" in page
    assert '<b>Worse (1):</b> <a href="#task-3">HumanEval/3</a></p>' in page
    assert 'id="task-3"' in page


@pytest.mark.timeout(60)
def test_names_from_programs_are_escaped() -> None:
    table = Table(("kind",), [["<img src=x>"], ["a|b\r\nc"], ["$\\frac$"]])
    text = render_markdown([Section("x", table=table)])
    assert text.splitlines()[-3:] == ["| `<img src=x>` |", "| `a\\|b c` |", "| `$\\frac$` |"]
    page = render_page(make_run("<img src=x>"))
    assert "&lt;img src=x&gt;" in page
    assert "<img" not in page
    pytest.importorskip("matplotlib")
    assert "<svg" in draw_svg({"rules": [(5, 1.0)]}, {"rules": {"$\\frac$": 1, "passed": 1}})


HOSTILE_NAMES = [
    "<script>alert(1)</script>",
    "<img src=https://host/x>",
    "![x](https://host/x)",
    "[x](https://host/x)",
    "[x]: https://host/x",
    "https://host/x",
    "www.host.example",
    "a@host.example",
    "<https://host/x>",
    "`code`",
    "``code` `` [x](https://host/x)",
    "`",
    "a`",
    "**bold** _italic_ ~~gone~~",
    "a | b",
    "a \\| [x](https://host/x)",
    "\\",
    "a\n\n# heading\n<b>x</b>",
    "&lt;b&gt;",
    "@user #1",
]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_name_in_a_report_is_text(name: str) -> None:
    markdown = pytest.importorskip("markdown_it", reason="markdown-it-py is not installed")
    text = render_markdown([Section("x", table=Table(("a", "b"), [[name, "last"]]))])
    tokens = markdown.MarkdownIt("commonmark").enable("table").parse(text)
    (name_cell, last_cell) = [token for token in tokens if token.type == "inline"][-2:]
    assert last_cell.content == "last"
    assert [child.type for child in name_cell.children] == ["code_inline"]
    assert name_cell.children[0].content == " ".join(name.split())


def test_invisible_characters_of_a_report_are_escaped() -> None:
    name = "x\u202ey\ud800\x1b\0"
    for text in (render_markdown([Section("x", table=Table(("a",), [[name]]))]), render_page(make_run(name))):
        assert "x\\u202ey\\ud800\\x1b\\x00" in text


@pytest.mark.parametrize(
    "text", ["passed", "91.7 %", "Yuan2.0-102B, self-consistency", "1:02:03", "−1.2 points", "stop: token 28956"]
)
def test_plain_text_stays_plain(text: str) -> None:
    assert render_markdown([Section("x", table=Table((text,), []))]).count(f"| {text} |") == 1
