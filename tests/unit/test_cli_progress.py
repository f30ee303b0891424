"""Progress on a terminal and elsewhere."""

from __future__ import annotations

import io

import pytest

from yuan_grpc.cli.common.progress import Progress
from yuan_grpc.cli.common.terminal import Notes


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_persistent_progress_is_a_line_every_ten_seconds_where_there_is_no_terminal() -> None:
    stream, now = io.StringIO(), [0.0]
    progress = Progress("samples", 10, initial=4, persistent=True, stream=stream, clock=lambda: now[0])
    with progress:
        for _ in range(3):
            now[0] += 6
            progress.advance(tokens=60)
    progress.end()
    assert stream.getvalue().splitlines() == [
        "samples: 6/10, 0.2/s, 10 tokens/s, ETA 0:24",
        "samples: 7/10, 0.2/s, 10 tokens/s, ETA 0:18",
    ]


def test_other_progress_prints_nothing_where_there_is_no_terminal() -> None:
    stream, now = io.StringIO(), [0.0]
    with Progress("answers", 2, stream=stream, clock=lambda: now[0]) as progress:
        for _ in range(2):
            now[0] += 60
            progress.advance()
    assert stream.getvalue() == ""


def test_a_persistent_bar_stays_on_the_terminal_with_its_rates() -> None:
    pytest.importorskip("tqdm")
    stream = Terminal()
    with Progress("samples", 7, initial=4, persistent=True, stream=stream) as progress:
        for _ in range(3):
            progress.advance(tokens=60)
    last_line = stream.getvalue().rstrip("\n").rpartition("\r")[2]
    assert last_line.startswith("samples: 100%")
    assert "7/7" in last_line
    assert "tokens/s" in last_line
    assert stream.getvalue().endswith("\n")


def test_another_bar_does_not_appear_within_the_first_second() -> None:
    stream = Terminal()
    with Progress("answers", 2, stream=stream) as progress, progress.paused():
        progress.advance()
    assert stream.getvalue() == ""


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["file", "terminal"])
def test_a_quiet_command_shows_no_progress(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Notes, "quiet", True)
    with Progress("samples", 1, persistent=True, stream=stream) as progress:
        progress.advance()
    assert stream.getvalue() == ""
