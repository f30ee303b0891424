"""The end of a request shortly before its deadline."""

import asyncio

import pytest

from yuan_grpc.server.core.deadline import cutoff_delay, deadline_event


async def test_the_event_is_set_before_the_deadline() -> None:
    with deadline_event(0.01) as deadline:
        assert deadline
        await deadline.wait()


async def test_the_event_is_not_set_after_the_block() -> None:
    with deadline_event(0.01) as deadline:
        pass
    assert deadline
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(deadline.wait(), 0.02)


def test_without_a_deadline_there_is_no_event() -> None:
    with deadline_event(None) as deadline:
        assert deadline is None


def test_a_margin_is_left_before_the_deadline() -> None:
    assert cutoff_delay(100) == 99.75
    assert cutoff_delay(1) == 0.9
    assert cutoff_delay(-1) == 0
