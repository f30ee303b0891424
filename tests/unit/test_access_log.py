"""The access log of many refused calls."""

import logging

import grpc
import pytest

from yuan_grpc.server.core import access_log
from yuan_grpc.server.core.access_log import log_call, log_error
from yuan_grpc.server.errors import OverloadedError


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


async def test_a_refused_call_has_no_second_line(caplog: pytest.LogCaptureFixture) -> None:
    error = OverloadedError("full")
    error.__cause__ = ValueError("of the engine")
    log_error(error, error.code, "id")
    assert caplog.messages == []
