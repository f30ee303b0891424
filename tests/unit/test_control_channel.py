"""Calls between the supervisor and a front end."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from multiprocessing import Pipe

import pytest

from yuan_grpc.server.errors import InvalidRequestError, Violation
from yuan_grpc.server.frontends.control import ControlChannel, Handler, PeerLostError


@asynccontextmanager
async def channels(**handlers: Handler) -> AsyncIterator[tuple[ControlChannel, ControlChannel]]:
    """Yield two ends of a channel; the second one has the handlers."""
    near, far = Pipe()
    ends = ControlChannel(near, {}), ControlChannel(far, handlers)
    for end in ends:
        end.start()
    yield ends
    for end in ends:
        end.close()


async def test_a_call_returns_the_result_of_the_other_process() -> None:
    async def add(first: int, second: int) -> int:
        return first + second

    async with channels(add=add) as (near, _):
        first, second = await asyncio.gather(near.call("add", 1, 2), near.call("add", 3, 4))
        assert (first, second) == (3, 7)


async def test_an_error_of_the_service_arrives_with_its_violations() -> None:
    async def fail() -> None:
        raise InvalidRequestError([Violation("name", "`name` must be short")])

    async with channels(fail=fail) as (near, _):
        with pytest.raises(InvalidRequestError, match="`name` must be short") as raised:
            await near.call("fail")
    assert raised.value.violations == [Violation("name", "`name` must be short")]


async def test_an_unexpected_error_arrives_with_its_traceback() -> None:
    async def divide() -> float:
        return 1 / 0

    async with channels(divide=divide) as (near, _):
        with pytest.raises(ZeroDivisionError) as raised:
            await near.call("divide")
    assert "return 1 / 0" in raised.value.__notes__[0]


async def test_cancelling_a_call_cancels_it_in_the_other_process() -> None:
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def hang() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with channels(hang=hang) as (near, _):
        call = asyncio.ensure_future(near.call("hang"))
        await started.wait()
        call.cancel()
        await cancelled.wait()


async def test_a_notification_needs_no_answer() -> None:
    received = asyncio.Event()

    async def receive() -> None:
        received.set()

    async with channels(receive=receive) as (near, _):
        near.notify("receive")
        await received.wait()


async def test_the_end_of_the_other_process_ends_its_calls() -> None:
    async def hang() -> None:
        await asyncio.Event().wait()

    async with channels(hang=hang) as (near, far):
        call = asyncio.ensure_future(near.call("hang"))
        await asyncio.sleep(0)
        far.close()
        with pytest.raises(PeerLostError):
            await call
        await near.closed.wait()
        near.notify("hang")
