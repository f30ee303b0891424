"""The access log of many refused calls."""

import logging

import grpc
import pytest

from yuan_grpc.server.core import access_log, request_stats
from yuan_grpc.server.core.access_log import log_call, log_error
from yuan_grpc.server.core.request_stats import RequestStats
from yuan_grpc.server.engine.types import ChoiceDelta, StepOutput
from yuan_grpc.server.errors import InvalidRequestError, OverloadedError, Violation


def end_call(code: grpc.StatusCode) -> None:
    with log_call("Generate") as outcome:
        outcome.code = code


@pytest.mark.parametrize("code", [grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE])
async def test_refused_calls_are_summed_up(code: grpc.StatusCode, caplog: pytest.LogCaptureFixture) -> None:
    access_log.flush()
    with caplog.at_level(logging.INFO):
        for _ in range(5):
            end_call(code)
        end_call(grpc.StatusCode.OK)
        access_log.flush()
        end_call(code)
        access_log.flush()
    lines = [line.split(" after")[0] for line in caplog.messages]
    name = code.name
    assert lines == [
        f"Generate '': {name}",
        "Generate '': OK",
        f"Generate: {name} for 4 more calls",
        f"Generate '': {name}",
    ]


def test_a_line_has_caller_model_tokens_and_times(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_stats, "monotonic", lambda: 0.0)
    stats = RequestStats()
    with caplog.at_level(logging.INFO), log_call("Generate") as outcome:
        outcome.code, outcome.subject, outcome.peer = grpc.StatusCode.OK, "id", "ipv4:192.0.2.1:5"
        access_log.current_outcome().begin(stats, "yuan", prompt_tokens=7)
        stats.observe(StepOutput())
        stats.observe(StepOutput([ChoiceDelta(0, "a", (1, 2))], queue_seconds=0.25, first_token_seconds=0.5))
        stats.observe(StepOutput([ChoiceDelta(0, "b", (3,))], queue_seconds=9, first_token_seconds=9))
    (line,) = caplog.messages
    assert line.startswith("Generate 'id': OK after 0.")
    details = "peer ipv4:192.0.2.1:5, model yuan, 7 tokens in, 3 out, queued 0.250 s, first token after 0.500 s"
    assert line.endswith(f" s, {details}")


def test_a_refused_call_names_the_fields(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), log_call("Generate") as outcome:
        error = InvalidRequestError(
            [Violation("top_p", "too large"), Violation("", "odd"), Violation("n", "too small")]
        )
        outcome.set_error(error, error.code)
    assert caplog.messages[0].startswith("Generate '': INVALID_ARGUMENT (top_p, n) after 0.")


def test_outside_of_a_call_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    access_log.current_outcome().begin(RequestStats(), "yuan", prompt_tokens=1)
    assert caplog.messages == []


async def test_a_refused_call_has_no_second_line(caplog: pytest.LogCaptureFixture) -> None:
    error = OverloadedError("full")
    error.__cause__ = ValueError("of the engine")
    log_error(error, error.code, "id")
    assert caplog.messages == []
