"""Samples from servers: as many at a time as they compute, through restarts, each recorded once."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from yuan_grpc.client import Completion, Token, YuanError
from yuan_grpc.humaneval.extraction import FENCE
from yuan_grpc.humaneval.records import Record, Records, Run

GREEDY: dict[str, Any] = {"temperature": 1.0, "top_k": 1, "top_p": 0.0}
REQUEST: dict[str, Any] = {
    "max_tokens": 512,
    "use_beam_search": False,
    "stop": ["<eod>"],
    "include_stop_str_in_output": True,  # the closing fence is part of what the rules are for
}
"""The published request, but for its 256 tokens, which cut answers off, and for the stop at the closing fence."""
FENCE_PROBE = "\n```"

TRANSIENT = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED}
"""What a server gets over, so that it is asked for as long as there is patience."""
PERMANENT = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.FAILED_PRECONDITION}
"""What stays so, however often it is asked."""
ATTEMPTS = 3
"""At errors of any other kind."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0


Generate = Callable[..., Awaitable[Completion]]
"""What is needed of `AsyncClient`: its `generate`, with a prompt and the request's fields; raises YuanError."""


@dataclass
class Target:
    """A server, how many samples are asked of it at a time, and how it is."""

    name: str
    generate: Generate
    concurrency: int
    answered: float = 0.0
    """When it last did, on the clock of the generation."""
    resting_until: float = 0.0
    failures: int = 0
    """Times that it was tried again in vain."""
    given_up: bool = False


@dataclass
class Job:
    """A sample to be generated, and its mishaps so far."""

    task_id: str
    sample: int
    attempts: int = 0
    failing_since: float | None = None
    """When a server was first lost over it, perhaps by chance."""


class PatienceError(RuntimeError):
    """No server answers any more; the message says for how long, and the last error."""


@dataclass
class Generation:
    """The work of generating all samples that the records do not have yet."""

    records: Records
    targets: Sequence[Target]
    patience: float = 600.0
    """Seconds for which a server may answer nothing but that it cannot."""
    told: Callable[[Record], None] = lambda record: None
    """Called with each record that has been kept."""
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    _jobs: deque[Job] = field(default_factory=deque)
    _last_error: str = ""

    async def run(self) -> None:
        """Returns when every sample is recorded, with its text or with an error that stays.

        Raises PatienceError where the servers are gone, and what the file's disk raises. Cancelled, it cancels all
        calls that run. In any case what is recorded stays, and the rest can be generated later.
        """
        self._jobs.extend(Job(*key) for key in self.records.missing)
        self._left = len(self._jobs)
        self._changed = asyncio.Event()
        for target in self.targets:
            target.answered = self.clock()
        workers = {
            asyncio.create_task(self._work(target))
            for target in self.targets
            for _ in range(min(target.concurrency, self._left))
        }
        try:
            await self._until_ended(workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        if self._left:
            raise PatienceError(
                f"no server has answered for {self.patience:.0f} s; {self._left} samples are left. {self._last_error}"
            )

    async def _until_ended(self, workers: set[asyncio.Task[None]]) -> None:
        while workers:
            ended, workers = await asyncio.wait(workers, return_when=asyncio.FIRST_COMPLETED)
            for worker in ended:
                worker.result()

    async def _work(self, target: Target) -> None:
        """Takes one job after the other, until none is left or the server is given up."""
        while self._left and not target.given_up:
            if (rest := target.resting_until - self.clock()) > 0:
                await self.sleep(rest)
            elif self._jobs:
                await self._try(target, self._jobs.popleft())
            else:
                # Others are at the last jobs, and may give them back.
                self._changed.clear()
                await self._changed.wait()

    async def _try(self, target: Target, job: Job) -> None:
        begun = self.clock()
        run = self.records.run
        parameters = run.request if run.seed is None else {**run.request, "seed": run.seed + job.sample}
        try:
            answer = await target.generate(run.prompts[job.task_id], **parameters)
        except YuanError as error:
            self._fail(target, job, error)
        else:
            target.answered, target.failures = self.clock(), 0
            self._keep(record_of(job, answer, target.name, round(self.clock() - begun, 3)))

    def _fail(self, target: Target, job: Job, error: YuanError) -> None:
        """Gives the job back, or records its error where trying again is of no use."""
        now = self.clock()
        self._last_error = f"{target.name}: {error.code.name}: {error.message}"
        job.attempts += 1
        if error.code is grpc.StatusCode.UNAVAILABLE and job.failing_since is None:
            job.failing_since = now
        lasting = error.code in PERMANENT or (error.code not in TRANSIENT and job.attempts >= ATTEMPTS)
        if lasting or self._is_deadly(job, target, now):
            what = {"code": error.code.name, "message": error.message}
            self._keep(Record(job.task_id, job.sample, target=target.name, request_id=error.request_id, error=what))
            return
        target.given_up = now - target.answered > self.patience
        self._rest(target, now, error.retry_after)
        self._jobs.append(job)  # behind the others, so that they are tried before it is again
        self._changed.set()

    def _is_deadly(self, job: Job, target: Target, now: float) -> bool:
        """Whether the server answers others but not this one, of which it dies each time."""
        since = job.failing_since
        return since is not None and now - since > self.patience and target.answered > since

    def _rest(self, target: Target, now: float, asked: float | None) -> None:
        """Leaves a server alone for a while: what it asked for, or twice as long each time that it fails again."""
        if now < target.resting_until:
            return  # a call that had begun before
        pause: float = min(FIRST_PAUSE * 2.0**target.failures, LONGEST_PAUSE)
        target.failures += 1
        target.resting_until = now + max(pause, asked or 0.0)

    def _keep(self, record: Record) -> None:
        self.records.append(record)
        self._left -= 1
        self.told(record)
        if not self._left:
            self._changed.set()


def record_of(job: Job, answer: Completion, target: str, seconds: float) -> Record:
    """What is kept of an answer."""
    choice = answer.choices[0]
    return Record(
        job.task_id,
        job.sample,
        text=choice.text,
        finish_reason=choice.finish_reason,
        stop_string=choice.stop_string,
        stop_token_id=choice.stop_token_id,
        prompt_tokens=answer.usage.prompt_tokens,
        completion_tokens=answer.usage.completion_tokens,
        seed=answer.seed,
        request_id=answer.request_id,
        target=target,
        seconds=seconds,
    )


def stopping_at_fence(request: dict[str, Any], probe: Sequence[Token]) -> dict[str, Any]:
    """The request, made to stop at the closing fence; `probe` are the tokens of FENCE_PROBE.

    In the published vocabulary the fence is one token, 28956. Where it is not, its text does.
    """
    if probe and probe[-1].piece == FENCE:
        return {**request, "stop_token_ids": [probe[-1].id]}
    return {**request, "stop": [*request["stop"], FENCE_PROBE]}


def request_of(run: Run) -> str:
    """A run's request in a line, for people."""
    return ", ".join(f"{name} {value}" for name, value in run.request.items() if value is not False)
