"""Generation: each sample once, despite overload, restarts and Ctrl-C."""

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
from yuan_grpc.humaneval.generation import REQUEST, Generation, PatienceError, Target, add_fence_stop
from yuan_grpc.humaneval.records import RecordFile, Run
from yuan_grpc.v1 import yuan_pb2

Status = grpc.StatusCode
PROMPTS = {f"task/{i}": f"prompt {i}" for i in range(20)}
RUN = Run({"name": "yuan", "dtype": "float32"}, {"max_tokens": 8}, 1, None, PROMPTS)


def completion(text: str, seed: int | None = None) -> Completion:
    """Return a completion as a server sends it."""
    choice = Choice(0, text, (1, 2), "stop", None, 28956, None, ())
    return Completion((choice,), Usage(3, 2, 0), seed, "id", "yuan", (), (), yuan_pb2.GenerateResponse())


@dataclass
class FakeServer:
    """Returns a completion, or raises the error that `errors` returns; `calls` has the prompts and parameters."""

    errors: Callable[[str, int], Status | None] = lambda prompt, call: None
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    running: int = 0
    peak: int = 0
    gate: asyncio.Event | None = None
    waiting: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once a call waits at the gate."""
    cancelled: int = 0

    async def generate(self, prompt: str, **parameters: Any) -> Completion:
        """Stand in for `AsyncClient.generate`."""
        self.calls.append((prompt, parameters))
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            if self.gate:
                self.waiting.set()
                await self.gate.wait()
            await asyncio.sleep(0)
            code = self.errors(prompt, len(self.calls))
            if code:
                raise YuanError(code, f"{code.name} of {prompt}")
            return completion(f"text of {prompt}", parameters.get("seed"))
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1


@dataclass
class FakeClock:
    """Time that passes only in `sleep`."""

    now: float = 1000.0
    delays: list[float] = field(default_factory=list)

    def time(self) -> float:
        """Stand in for `time.monotonic`."""
        return self.now

    def sleep(self, seconds: float) -> Awaitable[None]:
        """Stand in for `asyncio.sleep`, without a delay."""
        self.now += seconds
        self.delays.append(seconds)
        return asyncio.sleep(0)


def generation(
    file: RecordFile, *servers: FakeServer, clock: FakeClock | None = None, concurrency: int = 4
) -> Generation:
    """Return a generation on the servers, with a fake clock."""
    clock = clock or FakeClock()
    targets = [Target(f"host:{i}", server.generate, concurrency) for i, server in enumerate(servers)]
    return Generation(file, targets, patience=600, clock=clock.time, sleep=clock.sleep)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Path of a run's file, which does not exist yet."""
    return tmp_path / records.FILE


async def test_every_sample_is_recorded_once_with_its_metadata(path: Path) -> None:
    server = FakeServer()
    with RecordFile(path, RUN) as file:
        await generation(file, server).run()
    run, recorded = records.read(path)
    assert sorted(record.key for record in recorded) == sorted(run.keys)
    assert {record.task_id: record.text for record in recorded} == {t: f"text of {p}" for t, p in PROMPTS.items()}
    first = recorded[0]
    assert (first.finish_reason, first.stop_token_id, first.prompt_tokens, first.completion_tokens) == (
        "stop",
        28956,
        3,
        2,
    )
    assert (first.target, first.request_id, first.error) == ("host:0", "id", None)
    assert all(parameters == {"max_tokens": 8} for _, parameters in server.calls)


async def test_each_server_has_concurrent_calls_up_to_its_limit(path: Path) -> None:
    servers = FakeServer(), FakeServer()
    with RecordFile(path, RUN) as file:
        await generation(file, *servers, concurrency=3).run()
    assert [server.peak for server in servers] == [3, 3]
    assert sum(len(server.calls) for server in servers) == len(PROMPTS)


async def test_the_seed_of_a_sample_depends_only_on_the_run_and_its_number(path: Path) -> None:
    run = Run(RUN.model, {"temperature": 0.8}, 3, 100, PROMPTS)
    server = FakeServer()
    with RecordFile(path, run) as file:
        await generation(file, server).run()
    assert Counter(p["seed"] for _, p in server.calls) == {100: 20, 101: 20, 102: 20}
    assert all(record.seed == 100 + record.sample for record in records.read(path)[1])


@pytest.mark.parametrize("code", [Status.UNAVAILABLE, Status.RESOURCE_EXHAUSTED, Status.INTERNAL])
async def test_transient_errors_are_retried(path: Path, code: Status) -> None:
    seen: set[str] = set()

    def once(prompt: str, _: int) -> Status | None:
        first = prompt not in seen
        seen.add(prompt)
        return code if first else None

    with RecordFile(path, RUN) as file:
        await generation(file, FakeServer(once)).run()
    assert all(not record.error for record in records.read(path)[1])


async def test_a_server_that_restarts_for_minutes_is_retried_with_growing_delays(path: Path) -> None:
    clock = FakeClock()
    server = FakeServer(lambda prompt, call: Status.UNAVAILABLE if clock.now < 1500 else None)
    with RecordFile(path, RUN) as file:
        await generation(file, server, clock=clock, concurrency=1).run()
    assert len(records.read(path)[1]) == len(PROMPTS)
    assert clock.delays[:4] == [0.5, 1, 2, 4]
    assert max(clock.delays) == 30


async def test_the_end_of_patience_leaves_the_remaining_samples_to_a_later_run(path: Path) -> None:
    server = FakeServer(lambda prompt, call: Status.UNAVAILABLE if call > 5 else None)
    with RecordFile(path, RUN) as file:
        with pytest.raises(PatienceError, match=r"600 s; 15 samples remain.*UNAVAILABLE of prompt"):
            await generation(file, server, concurrency=1).run()
        assert len(file.done) == 5
    with RecordFile(path, RUN) as file:
        await generation(file, FakeServer()).run()
        assert file.missing == []


async def test_samples_of_an_unavailable_server_move_to_another(path: Path) -> None:
    unavailable, available = FakeServer(lambda *_: Status.UNAVAILABLE), FakeServer()
    with RecordFile(path, RUN) as file:
        await generation(file, unavailable, available).run()
    assert {record.target for record in records.read(path)[1]} == {"host:1"}


async def test_a_permanent_error_is_recorded_and_the_other_samples_continue(path: Path) -> None:
    server = FakeServer(lambda prompt, _: Status.INVALID_ARGUMENT if prompt == "prompt 3" else None)
    with RecordFile(path, RUN) as file:
        await generation(file, server).run()
        failed = [record for record in file.done.values() if record.error]
    assert [record.task_id for record in failed] == ["task/3"]
    assert failed[0].error == {"code": "INVALID_ARGUMENT", "message": "INVALID_ARGUMENT of prompt 3"}
    assert len(server.calls) == len(PROMPTS)


async def test_an_internal_error_is_recorded_after_three_attempts(path: Path) -> None:
    server = FakeServer(lambda prompt, _: Status.INTERNAL if prompt == "prompt 3" else None)
    with RecordFile(path, RUN) as file:
        await generation(file, server).run()
        assert [record.task_id for record in file.done.values() if record.error] == ["task/3"]
    assert Counter(prompt for prompt, _ in server.calls)["prompt 3"] == 3


async def test_a_request_that_crashes_the_server_is_recorded_as_failed_and_the_server_is_kept(path: Path) -> None:
    server = FakeServer(lambda prompt, _: Status.UNAVAILABLE if prompt == "prompt 3" else None)
    clock = FakeClock()
    with RecordFile(path, RUN) as file:
        await generation(file, server, clock=clock, concurrency=1).run()
        assert [record.task_id for record in file.done.values() if record.error] == ["task/3"]
        assert file.missing == []
    assert clock.now > 1600


async def test_cancellation_cancels_the_calls_and_keeps_the_recorded_samples(path: Path) -> None:
    server = FakeServer()
    with RecordFile(path, RUN) as file:
        running = generation(file, server)

        def block_after_five(record: records.Record) -> None:
            server.gate = server.gate or (asyncio.Event() if len(file.done) == 5 else None)

        running.on_record = block_after_five
        task = asyncio.create_task(running.run())
        await server.waiting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        done = len(file.done)
    assert server.running == 0
    assert server.cancelled > 0
    server.gate = None
    with RecordFile(path, RUN) as file:
        await generation(file, server).run()
    recorded = records.read(path)[1]
    assert 5 <= done < len(PROMPTS)
    assert sorted(record.key for record in recorded) == sorted(RUN.keys)


async def test_a_write_error_ends_the_run_and_cancels_the_other_calls(path: Path) -> None:
    server = FakeServer()

    def refuse(record: records.Record) -> None:
        server.gate = asyncio.Event()
        raise OSError("full")

    with RecordFile(path, RUN) as file:
        running = generation(file, server)
        running.on_record = refuse
        with pytest.raises(OSError, match="full"):
            await running.run()
    assert server.running == 0


def test_the_fence_is_a_stop_token_if_the_vocabulary_has_it_and_a_stop_string_otherwise() -> None:
    published = [Token(13, "<0x0A>", 0, 1), Token(28956, "```", 1, 4)]
    assert add_fence_stop(REQUEST, published)["stop_token_ids"] == [28956]
    other = add_fence_stop(REQUEST, [Token(5, "`", 3, 4)])
    assert (other["stop"], other.get("stop_token_ids")) == (["<eod>", "\n```"], None)
    assert REQUEST["stop"] == ["<eod>"]
