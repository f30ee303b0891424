"""Rendering of the report and its plot."""

from __future__ import annotations

import pytest

from yuan_grpc.humaneval import report
from yuan_grpc.humaneval.formatting import format_duration
from yuan_grpc.humaneval.plot import draw_svg, group_by_length


def test_durations_are_hours_minutes_and_seconds() -> None:
    assert [format_duration(s) for s in (0, 59.6, 3599, 36061)] == ["0:00", "1:00", "59:59", "10:01:01"]


def test_groups_of_a_plot_have_about_equal_sizes() -> None:
    assert group_by_length([(5, 1.0), (1, 0.0), (3, 1.0), (4, 0.0)], 2) == [(1, 3, 0.5), (4, 5, 0.5)]
    assert group_by_length([(1, 1.0)], 8) == [(1, 1, 1.0)]
    assert group_by_length([]) == []


def test_names_from_programs_are_escaped() -> None:
    table = report.Table(("kind",), [["<img src=x>"], ["a|b\r\nc"], ["$\\frac$"]])
    text = report.render_markdown([report.Section("x", table=table)])
    assert text.splitlines()[-3:] == ["| `<img src=x>` |", "| `a\\|b c` |", "| `$\\frac$` |"]
    assert "&lt;img src=x&gt;" in report.render_html([report.Section("x", table=table)], "")
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
    text = report.render_markdown([report.Section("x", table=report.Table(("a", "b"), [[name, "last"]]))])
    tokens = markdown.MarkdownIt("commonmark").enable("table").parse(text)
    (name_cell, last_cell) = [token for token in tokens if token.type == "inline"][-2:]
    assert last_cell.content == "last"
    assert [child.type for child in name_cell.children] == ["code_inline"]
    assert name_cell.children[0].content == " ".join(name.split())


def test_invisible_characters_of_a_report_are_escaped() -> None:
    table = report.Table(("a",), [["x\u202ey\ud800\x1b\0"]])
    for text in (
        report.render_markdown([report.Section("x", table=table)]),
        report.render_html([report.Section("x", table=table)], ""),
    ):
        assert "x\\u202ey\\ud800\\x1b\\x00" in text


@pytest.mark.parametrize("text", ["passed", "91.7 %", "Yuan2.0-102B, self-consistency", "1:02:03", "stop: token 28956"])
def test_plain_text_stays_plain(text: str) -> None:
    assert report.render_markdown([report.Section("x", table=report.Table((text,), []))]).count(f"| {text} |") == 1
