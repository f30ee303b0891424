"""Generation: every sample once, through overload, restarts and Ctrl-C."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from yuan_grpc.client import Choice, Completion, Token, Usage, YuanError
from yuan_grpc.humaneval import records
from yuan_grpc.humaneval.generation import REQUEST, Generation, PatienceError, Target, stopping_at_fence
from yuan_grpc.humaneval.records import Records, Run
from yuan_grpc.v1 import yuan_pb2

Status = grpc.StatusCode
PROMPTS = {f"task/{i}": f"prompt {i}" for i in range(20)}
RUN = Run({"name": "yuan", "dtype": "float32"}, {"max_tokens": 8}, 1, None, PROMPTS)


def answer(text: str, seed: int | None = None) -> Completion:
    """What a server says."""
    choice = Choice(0, text, (1, 2), "stop", None, 28956, None, ())
    return Completion((choice,), Usage(3, 2, 0), seed, "id", "yuan", (), (), yuan_pb2.GenerateResponse())


@dataclass
class FakeServer:
    """Answers in its own time, or raises what it is told to; `calls` has what it was asked."""

    errors: Callable[[str, int], Status | None] = lambda prompt, call: None
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    running: int = 0
    most: int = 0
    gate: asyncio.Event | None = None
    held: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a call waits at the gate."""
    cancelled: int = 0

    async def generate(self, prompt: str, **parameters: Any) -> Completion:
        """As `AsyncClient.generate`."""
        self.calls.append((prompt, parameters))
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            if self.gate:
                self.held.set()
                await self.gate.wait()
            await asyncio.sleep(0)
            code = self.errors(prompt, len(self.calls))
            if code:
                raise YuanError(code, f"{code.name} of {prompt}")
            return answer(f"text of {prompt}", parameters.get("seed"))
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1


@dataclass
class FakeClock:
    """Time that passes only in sleep."""

    now: float = 1000.0
    slept: list[float] = field(default_factory=list)

    def time(self) -> float:
        """As `time.monotonic`."""
        return self.now

    def sleep(self, seconds: float) -> Awaitable[None]:
        """As `asyncio.sleep`, at once."""
        self.now += seconds
        self.slept.append(seconds)
        return asyncio.sleep(0)


def generation(kept: Records, *servers: FakeServer, clock: FakeClock | None = None, concurrency: int = 4) -> Generation:
    """The work on the servers, in time that does not pass."""
    clock = clock or FakeClock()
    targets = [Target(f"host:{i}", server.generate, concurrency) for i, server in enumerate(servers)]
    return Generation(kept, targets, patience=600, clock=clock.time, sleep=clock.sleep)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the run's file is to be."""
    return tmp_path / records.FILE


async def test_every_sample_is_recorded_once_with_all_that_is_known_of_it(path: Path) -> None:
    server = FakeServer()
    with Records(path, RUN) as kept:
        await generation(kept, server).run()
    run, found = records.read(path)
    assert sorted(record.key for record in found) == sorted(run.keys)
    assert {record.task_id: record.text for record in found} == {t: f"text of {p}" for t, p in PROMPTS.items()}
    first = found[0]
    assert (first.finish_reason, first.stop_token_id, first.prompt_tokens, first.completion_tokens) == (
        "stop",
        28956,
        3,
        2,
    )
    assert (first.target, first.request_id, first.error) == ("host:0", "id", None)
    assert all(parameters == {"max_tokens": 8} for _, parameters in server.calls)


async def test_as_many_run_at_a_time_as_asked_for(path: Path) -> None:
    servers = FakeServer(), FakeServer()
    with Records(path, RUN) as kept:
        await generation(kept, *servers, concurrency=3).run()
    assert [server.most for server in servers] == [3, 3]
    assert sum(len(server.calls) for server in servers) == len(PROMPTS)


async def test_samples_have_seeds_of_their_own_that_a_resumed_run_gives_again(path: Path) -> None:
    run = Run(RUN.model, {"temperature": 0.8}, 3, 100, PROMPTS)
    server = FakeServer()
    with Records(path, run) as kept:
        await generation(kept, server).run()
    assert Counter(p["seed"] for _, p in server.calls) == {100: 20, 101: 20, 102: 20}
    assert all(record.seed == 100 + record.sample for record in records.read(path)[1])


@pytest.mark.parametrize("code", [Status.UNAVAILABLE, Status.RESOURCE_EXHAUSTED, Status.INTERNAL])
async def test_transient_errors_are_tried_again(path: Path, code: Status) -> None:
    seen: set[str] = set()

    def once(prompt: str, _: int) -> Status | None:
        first = prompt not in seen
        seen.add(prompt)
        return code if first else None

    with Records(path, RUN) as kept:
        await generation(kept, FakeServer(once)).run()
    assert all(not record.error for record in records.read(path)[1])


async def test_a_restart_of_minutes_is_survived_with_ever_longer_pauses(path: Path) -> None:
    clock = FakeClock()
    server = FakeServer(lambda prompt, call: Status.UNAVAILABLE if clock.now < 1500 else None)
    with Records(path, RUN) as kept:
        await generation(kept, server, clock=clock, concurrency=1).run()
    assert len(records.read(path)[1]) == len(PROMPTS)
    assert clock.slept[:4] == [0.5, 1, 2, 4]
    assert max(clock.slept) == 30


async def test_patience_ends_and_nothing_is_recorded_that_could_still_be_had(path: Path) -> None:
    server = FakeServer(lambda prompt, call: Status.UNAVAILABLE if call > 5 else None)
    with Records(path, RUN) as kept:
        with pytest.raises(PatienceError, match=r"600 s; 15 samples are left.*UNAVAILABLE of prompt"):
            await generation(kept, server, concurrency=1).run()
        assert len(kept.done) == 5
    with Records(path, RUN) as kept:
        await generation(kept, FakeServer()).run()
        assert kept.missing == []


async def test_the_work_of_a_server_that_is_gone_goes_to_another(path: Path) -> None:
    gone, there = FakeServer(lambda *_: Status.UNAVAILABLE), FakeServer()
    with Records(path, RUN) as kept:
        await generation(kept, gone, there).run()
    assert {record.target for record in records.read(path)[1]} == {"host:1"}


async def test_permanent_errors_are_recorded_and_the_others_go_on(path: Path) -> None:
    server = FakeServer(lambda prompt, _: Status.INVALID_ARGUMENT if prompt == "prompt 3" else None)
    with Records(path, RUN) as kept:
        await generation(kept, server).run()
        failed = [record for record in kept.done.values() if record.error]
    assert [record.task_id for record in failed] == ["task/3"]
    assert failed[0].error == {"code": "INVALID_ARGUMENT", "message": "INVALID_ARGUMENT of prompt 3"}
    assert len(server.calls) == len(PROMPTS)


async def test_errors_of_the_servers_own_are_recorded_after_three_attempts(path: Path) -> None:
    server = FakeServer(lambda prompt, _: Status.INTERNAL if prompt == "prompt 3" else None)
    with Records(path, RUN) as kept:
        await generation(kept, server).run()
        assert [record.task_id for record in kept.done.values() if record.error] == ["task/3"]
    assert Counter(prompt for prompt, _ in server.calls)["prompt 3"] == 3


async def test_a_request_that_a_server_dies_of_is_given_up_and_not_the_server(path: Path) -> None:
    server = FakeServer(lambda prompt, _: Status.UNAVAILABLE if prompt == "prompt 3" else None)
    clock = FakeClock()
    with Records(path, RUN) as kept:
        await generation(kept, server, clock=clock, concurrency=1).run()
        assert [record.task_id for record in kept.done.values() if record.error] == ["task/3"]
        assert kept.missing == []
    assert clock.now > 1600


async def test_cancelling_cancels_the_calls_and_keeps_what_is_done(path: Path) -> None:
    server = FakeServer()
    with Records(path, RUN) as kept:
        work = generation(kept, server)

        def hold_after_five(record: records.Record) -> None:
            server.gate = server.gate or (asyncio.Event() if len(kept.done) == 5 else None)

        work.told = hold_after_five
        task = asyncio.create_task(work.run())
        await server.held.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        done = len(kept.done)
    assert server.running == 0
    assert server.cancelled > 0
    server.gate = None
    with Records(path, RUN) as kept:
        await generation(kept, server).run()
    found = records.read(path)[1]
    assert 5 <= done < len(PROMPTS)
    assert sorted(record.key for record in found) == sorted(RUN.keys)


async def test_what_the_disk_refuses_ends_the_run_and_cancels_the_rest(path: Path) -> None:
    server = FakeServer()

    def refuse(record: records.Record) -> None:
        server.gate = asyncio.Event()
        raise OSError("full")

    with Records(path, RUN) as kept:
        work = generation(kept, server)
        work.told = refuse
        with pytest.raises(OSError, match="full"):
            await work.run()
    assert server.running == 0


def test_the_fence_is_a_stop_token_where_it_is_a_token_and_text_elsewhere() -> None:
    published = [Token(13, "<0x0A>", 0, 1), Token(28956, "```", 1, 4)]
    assert stopping_at_fence(REQUEST, published)["stop_token_ids"] == [28956]
    other = stopping_at_fence(REQUEST, [Token(5, "`", 3, 4)])
    assert (other["stop"], other.get("stop_token_ids")) == (["<eod>", "\n```"], None)
    assert REQUEST["stop"] == ["<eod>"]
