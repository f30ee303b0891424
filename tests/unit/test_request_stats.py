"""The tokens and times of one request, with a clock that the test advances."""

import pytest

from yuan_grpc.server.core import request_stats
from yuan_grpc.server.core.request_stats import RequestStats
from yuan_grpc.server.engine.types import ChoiceDelta, Progress, StepOutput


class Clock:
    """A clock that stands still between `advance` calls."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(request_stats, "monotonic", clock)
    return clock


def tokens(*ids: int) -> StepOutput:
    return StepOutput([ChoiceDelta(0, "", ids)])


def test_the_time_to_the_first_token_includes_the_time_before_the_engine(clock: Clock) -> None:
    stats = RequestStats()
    clock.advance(1)  # for example to tokenize a long prompt
    stats.observe(StepOutput())
    clock.advance(10)
    stats.observe(
        StepOutput([ChoiceDelta(0, "", (1, 2, 3))], queue_seconds=2, prefill_seconds=1, first_token_seconds=4)
    )
    assert stats.first_token_seconds == pytest.approx(5)
    assert (stats.queue_seconds, stats.prefill_seconds) == (2, 1)
    assert stats.total_seconds == pytest.approx(11)
    assert stats.decode_seconds == pytest.approx(6)


def test_without_times_of_the_engine_the_first_output_counts(clock: Clock) -> None:
    stats = RequestStats()
    assert stats.decode_seconds is None
    clock.advance(2)
    stats.observe(tokens(1))
    clock.advance(3)
    stats.observe(tokens(2))
    assert stats.first_token_seconds == pytest.approx(2)
    assert stats.total_seconds == pytest.approx(5)
    assert stats.queue_seconds is None


def test_progress_of_a_search_is_a_first_token_but_no_message(clock: Clock) -> None:
    stats = RequestStats(stream=True)
    clock.advance(1)
    stats.observe(StepOutput(progress=Progress(1, 0)))
    clock.advance(1)
    stats.observe(StepOutput([ChoiceDelta(0, "", (1, 2))], discarded_tokens=5))
    assert stats.first_token_seconds == pytest.approx(1)
    assert (stats.completion_tokens, stats.messages) == (7, 1)


def test_a_prompt_without_tokens_has_times_too(clock: Clock) -> None:
    stats = RequestStats()
    stats.observe(StepOutput())
    stats.observe(StepOutput(queue_seconds=1, prefill_seconds=2, first_token_seconds=3))
    stats.observe(tokens())
    assert stats.first_token_seconds == pytest.approx(3)
    assert stats.completion_tokens == 0


def test_messages_of_a_stream_and_the_times_between_them_are_counted(clock: Clock) -> None:
    stats, unary = RequestStats(stream=True), RequestStats()
    for seconds, output in ((1, tokens(1)), (0.02, tokens(2, 3)), (20, tokens(4))):
        clock.advance(seconds)
        stats.observe(output)
        unary.observe(output)
    assert (stats.messages, stats.coalesced) == (3, 1)
    assert sum(stats.gaps) == 2
    assert stats.gaps[-1] == 1
    assert stats.gap_seconds == pytest.approx(20.02)
    assert (unary.messages, sum(unary.gaps)) == (0, 0)
