"""The log as JSON objects: the fields of a call, errors, and lines that are not written by `logging`."""

import json
import logging
import re
from dataclasses import replace
from typing import Any

import grpc
import pytest

from yuan_grpc.server.core import access_log, request_stats
from yuan_grpc.server.core.access_log import log_call, log_error
from yuan_grpc.server.core.request_stats import RequestStats
from yuan_grpc.server.engine.types import ChoiceDelta, StepOutput
from yuan_grpc.server.errors import InvalidRequestError, Violation
from yuan_grpc.server.log_format import JsonFormatter, create_formatter, format_line


def parse(record: logging.LogRecord) -> dict[str, Any]:
    line = JsonFormatter().format(record)
    assert "\n" not in line
    fields: dict[str, Any] = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", fields.pop("time"))
    return fields


def test_a_call_is_an_object_without_its_prompt_or_output(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_stats, "monotonic", lambda: 0.0)
    stats = RequestStats()
    headers = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    with caplog.at_level(logging.INFO), log_call("Generate", headers) as outcome:
        outcome.code, outcome.subject, outcome.peer = grpc.StatusCode.OK, "id\n1", "ipv4:192.0.2.1:5"
        outcome.caller = "team-a"
        access_log.current_outcome().begin(stats, "yuan", prompt_tokens=7)
        output = StepOutput([ChoiceDelta(0, "secret", (1, 2))], queue_seconds=0.25, first_token_seconds=0.5)
        stats.observe(replace(output, prefill_seconds=0.125))
    fields = parse(caplog.records[0])
    assert fields.pop("total_seconds") >= 0
    assert fields == {
        "level": "INFO",
        "logger": "yuan_grpc.server.core.access_log",
        "message": "Generate: OK",
        "method": "Generate",
        "status": "OK",
        "id": "id\n1",
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
        "peer": "ipv4:192.0.2.1:5",
        "caller": "team-a",
        "model": "yuan",
        "prompt_tokens": 7,
        "completion_tokens": 2,
        "queue_seconds": 0.25,
        "prefill_seconds": 0.125,
        "first_token_seconds": 0.5,
    }


def test_a_refused_call_has_its_reason_and_fields(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), log_call("Generate", {"traceparent": "nonsense"}) as outcome:
        outcome.set_error(error := InvalidRequestError([Violation("top_p", "too large")]), error.code)
    fields = parse(caplog.records[0])
    assert (fields["status"], fields["reason"]) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
    assert fields["fields"] == ["top_p"]
    assert "trace_id" not in fields


def test_a_traceback_is_in_the_line_of_its_error(caplog: pytest.LogCaptureFixture) -> None:
    log_error(ValueError("broken"), grpc.StatusCode.INTERNAL, "id")
    fields = parse(caplog.records[0])
    assert fields["id"] == "id"
    assert fields["exception"].endswith("ValueError: broken")


def test_lines_that_logging_does_not_write_have_the_same_form() -> None:
    assert format_line("text", "ERROR", "cannot start") == "cannot start\n"
    line = json.loads(format_line("json", "ERROR", "cannot\nstart"))
    assert (line["level"], line["message"]) == ("ERROR", "cannot\nstart")


def test_text_is_the_default() -> None:
    assert not isinstance(create_formatter("text"), JsonFormatter)
    assert isinstance(create_formatter("json"), JsonFormatter)
