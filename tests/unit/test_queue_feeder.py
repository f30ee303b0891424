"""Feeding the requests of one call through a queue that other calls fill too."""

import asyncio

import pytest

from yuan_grpc.server.core import backoff
from yuan_grpc.server.core.limits import MAX_IN_FLIGHT
from yuan_grpc.server.core.queue_feeder import QueueFeeder
from yuan_grpc.server.errors import OverloadedError


@pytest.mark.parametrize(("limit", "permits"), [(None, MAX_IN_FLIGHT), (3, 3), (10_000, MAX_IN_FLIGHT)])
async def test_a_call_has_no_more_permits_than_the_queue(limit: int | None, permits: int) -> None:
    assert await QueueFeeder(limit).permits.acquire(10_000) == permits


class Queue:
    """A queue that is full for a number of attempts.

    Attributes:
        may_finish: accepted requests wait for it.
    """

    def __init__(self, refusals: int = 0) -> None:
        self.refusals = refusals
        self.attempts = 0
        self.may_finish = asyncio.Event()

    async def request(self) -> str:
        self.attempts += 1
        if self.refusals:
            self.refusals -= 1
            raise OverloadedError("full")
        await self.may_finish.wait()
        return "done"


async def test_the_first_request_of_a_call_is_refused_at_once() -> None:
    queue = Queue(refusals=1)
    with pytest.raises(OverloadedError):
        await QueueFeeder(None).run(queue.request)
    assert queue.attempts == 1


async def test_a_request_waits_while_another_one_of_the_call_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "RETRY_SECONDS", 0)
    feeder, queue = QueueFeeder(None), Queue()
    first = asyncio.create_task(feeder.run(queue.request))
    await asyncio.sleep(0)
    queue.refusals = 3
    second = asyncio.create_task(feeder.run(queue.request))
    while queue.attempts < 5:  # noqa: ASYNC110 - one of the first request, and four of the second
        await asyncio.sleep(0)
    queue.may_finish.set()
    assert (await first, await second) == ("done", "done")


async def test_a_request_waits_after_another_one_of_the_call_has_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "RETRY_SECONDS", 0)
    feeder, queue = QueueFeeder(None), Queue()
    queue.may_finish.set()
    await feeder.run(queue.request)
    queue.refusals = 1
    assert await feeder.run(queue.request) == "done"
    assert queue.attempts == 3


async def test_other_errors_are_raised_at_once() -> None:
    feeder, queue = QueueFeeder(None), Queue()
    queue.may_finish.set()
    await feeder.run(queue.request)

    async def fail() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await feeder.run(fail)
