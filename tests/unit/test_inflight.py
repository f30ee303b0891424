"""Running calls: their ids, their number, and their end."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from yuan_grpc.server.core.inflight import ANY_CONNECTION, InflightRequests
from yuan_grpc.server.errors import (
    AbortedError,
    DuplicateRequestError,
    RequestNotFoundError,
    ServerStoppingError,
)


@asynccontextmanager
async def running(
    inflight: InflightRequests, request_id: str, connection: str | None
) -> AsyncIterator["asyncio.Task[None]"]:
    """Track a call that does not end by itself."""
    has_begun = asyncio.Event()

    async def run() -> None:
        with inflight.track(request_id, connection):
            has_begun.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(run())
    await has_begun.wait()
    yield task
    task.cancel()
    await asyncio.wait([task])


async def test_an_id_refers_to_a_call_of_its_connection_only() -> None:
    inflight = InflightRequests()
    async with running(inflight, "id", "a") as first, running(inflight, "id", "b") as second:
        await inflight.abort("id", "a")
        with pytest.raises(AbortedError):
            await first
        assert not second.done()


async def test_an_id_of_another_connection_looks_like_an_unknown_one() -> None:
    inflight, messages = InflightRequests(), []
    async with running(inflight, "known", "a"), running(inflight, "http", None):
        for request_id in ("known", "unknown", "http"):
            with pytest.raises(RequestNotFoundError) as raised:
                await inflight.abort(request_id, "b")
            messages.append(str(raised.value).replace(request_id, "ID"))
        with inflight.track("known", "b"), inflight.track("http", "b"):
            pass
    assert len(set(messages)) == 1


async def test_an_id_is_unique_on_its_connection() -> None:
    inflight = InflightRequests()
    async with running(inflight, "id", "a"):
        with pytest.raises(DuplicateRequestError), inflight.track("id", "a"):
            pass


async def test_a_generated_id_is_valid_on_every_connection() -> None:
    inflight = InflightRequests()
    async with running(inflight, "id", ANY_CONNECTION) as task:
        await inflight.abort("id", "b")
        with pytest.raises(AbortedError):
            await task


async def test_the_end_of_all_calls_is_an_error_of_each() -> None:
    inflight = InflightRequests()
    async with running(inflight, "id", "a") as first, running(inflight, "id", None) as second:
        inflight.end_all()
        for task in (first, second):
            with pytest.raises(ServerStoppingError):
                await task
    await inflight.wait_idle()


async def test_a_stopping_server_admits_no_call() -> None:
    inflight = InflightRequests()
    assert inflight.seconds_since_refusal == float("inf")
    inflight.stop_admitting()
    with pytest.raises(ServerStoppingError):
        inflight.check_admitting()
    assert inflight.seconds_since_refusal < 60


async def test_the_time_since_the_last_call_counts_from_its_end() -> None:
    inflight = InflightRequests()
    assert inflight.seconds_since_end == float("inf")
    with inflight.track_unnamed():
        assert inflight.seconds_since_end == float("inf")
    assert inflight.seconds_since_end < 60
