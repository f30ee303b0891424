"""The stall watchdog, with a fake engine."""

import asyncio

import pytest
from fake_engine import FakeEngine, last

from yuan_grpc.server.errors import OverloadedError
from yuan_grpc.server.settings.lifecycle import LifecycleSettings
from yuan_grpc.server.watchdog import CHECKS, Watchdog


class Watched:
    """A running watchdog, and what it has reported."""

    def __init__(self, engine: FakeEngine, exit_seconds: float | None = None, stall_seconds: float = 0.01) -> None:
        self.stalled, self.recovered = asyncio.Event(), asyncio.Event()
        settings = LifecycleSettings(stall_seconds=stall_seconds, stall_exit_seconds=exit_seconds)
        self.task = asyncio.ensure_future(Watchdog(engine, settings, self._stall, self._recover).run())

    async def _stall(self) -> None:
        self.stalled.set()

    async def _recover(self) -> None:
        self.recovered.set()

    async def end(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])


async def test_a_busy_engine_without_progress_is_stalled_until_it_makes_progress() -> None:
    engine = FakeEngine(hangs=True)
    engine.running = 1
    watched = Watched(engine)
    await watched.stalled.wait()
    await engine.began.wait()
    assert not watched.recovered.is_set()
    engine.progress += 1
    await watched.recovered.wait()
    await engine.freed.wait()  # the watchdog's own request
    await watched.end()


async def test_the_watchdog_sends_a_request_because_those_of_callers_may_be_gone() -> None:
    engine = FakeEngine(last("a"))
    engine.running = 1
    watched = Watched(engine)
    await watched.recovered.wait()
    assert [request.sampling.max_tokens for request in engine.requests[:1]] == [1]
    await watched.end()


async def test_a_full_queue_does_not_end_the_watch() -> None:
    engine = FakeEngine(OverloadedError("full"))
    engine.running = 1
    watched = Watched(engine)
    await watched.stalled.wait()
    while len(engine.requests) < 2:  # noqa: ASYNC110 - the fake engine has no event for it
        await asyncio.sleep(0)
    engine.script = (last("a"),)
    await watched.recovered.wait()
    await watched.end()


async def test_a_long_stall_ends_the_watch() -> None:
    engine = FakeEngine(hangs=True)
    engine.running = 1
    await asyncio.wait_for(Watched(engine, exit_seconds=0.01).task, 10)
    assert engine.running == 1  # the watchdog's own request is freed


async def test_an_idle_engine_is_not_stalled(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, checks = FakeEngine(), 0
    sleep = asyncio.sleep

    async def count(seconds: float) -> None:
        nonlocal checks
        checks += 1
        await sleep(0)

    monkeypatch.setattr("yuan_grpc.server.watchdog.asyncio.sleep", count)
    watched = Watched(engine)
    while checks < 10 * CHECKS:
        await sleep(0)
    assert not watched.stalled.is_set()
    await watched.end()


async def test_zero_seconds_disable_the_watch() -> None:
    engine = FakeEngine()
    engine.running = 1
    watched = Watched(engine, stall_seconds=0)
    await asyncio.sleep(0)
    assert not watched.stalled.is_set()
    await watched.end()
