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
    assert text.splitlines()[-3:] == ["| &lt;img src=x&gt; |", "| a\\|b c |", "| $\\frac$ |"]
    pytest.importorskip("matplotlib")
    assert "<svg" in draw_svg({"rules": [(5, 1.0)]}, {"rules": {"$\\frac$": 1, "passed": 1}})
