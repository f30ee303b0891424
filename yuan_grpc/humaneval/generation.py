"""Generation of samples on one or more servers, with retries across restarts. Each sample is recorded once."""

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
from yuan_grpc.humaneval.records import Record, RecordFile, Run

GREEDY: dict[str, Any] = {"temperature": 1.0, "top_k": 1, "top_p": 0.0}
REQUEST: dict[str, Any] = {
    "max_tokens": 512,
    "use_beam_search": False,
    "stop": ["<eod>"],
    "include_stop_str_in_output": True,  # the extraction rules need the closing fence
}
"""The published request, with 512 tokens instead of 256, which truncate answers, and without its stop at the fence."""
FENCE_PROBE = "\n```"
"""Text whose last token is the closing fence, if the vocabulary has a token for it."""

TRANSIENT = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED}
"""Errors that are retried as long as `patience` allows."""
PERMANENT = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.FAILED_PRECONDITION}
"""Errors that are recorded without a retry."""
MAX_ATTEMPTS = 3
"""Number of attempts that fail with any other error before it is recorded."""
MIN_BACKOFF, MAX_BACKOFF = 0.5, 30.0
"""Bounds of the delay before a server is tried again, in seconds."""


Generate = Callable[..., Awaitable[Completion]]
"""Signature of `AsyncClient.generate`: takes a prompt and request fields, raises YuanError."""


@dataclass
class Target:
    """A server, its concurrency limit and its state."""

    name: str
    generate: Generate
    concurrency: int
    last_response: float = 0.0
    """Time of the last successful call, on the clock of the generation."""
    backoff_until: float = 0.0
    failures: int = 0
    """Consecutive backoffs without a successful call."""
    is_abandoned: bool = False


@dataclass
class PendingSample:
    """A sample to generate, and its failed attempts."""

    task_id: str
    sample: int
    attempts: int = 0
    unavailable_since: float | None = None
    """When a call for this sample first failed with UNAVAILABLE; the sample may not be the cause."""


class PatienceError(RuntimeError):
    """No server has responded within the patience; the message gives it and the last error."""


@dataclass
class Generation:
    """Generation of all samples that the record file lacks."""

    records: RecordFile
    targets: Sequence[Target]
    patience: float = 600.0
    """Seconds after its last successful call until a failing server is abandoned."""
    on_record: Callable[[Record], None] = lambda record: None
    """Callback for each recorded sample."""
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    _pending: deque[PendingSample] = field(default_factory=deque)
    _last_error: str = ""

    async def run(self) -> None:
        """Generate until every sample is recorded, with its text or with a permanent error.

        Cancellation cancels all calls in progress. Samples recorded before an error or a cancellation are kept, and a
        later run generates the others.

        Raises:
            PatienceError: all servers are abandoned.
            OSError: a sample could not be written.
        """
        self._pending.extend(PendingSample(*key) for key in self.records.missing)
        self._remaining = len(self._pending)
        self._queue_changed = asyncio.Event()
        for target in self.targets:
            target.last_response = self.clock()
        workers = {
            asyncio.create_task(self._run_worker(target))
            for target in self.targets
            for _ in range(min(target.concurrency, self._remaining))
        }
        try:
            await self._wait_for(workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        if self._remaining:
            raise PatienceError(
                f"no server has responded for {self.patience:.0f} s; {self._remaining} samples remain."
                + (f" {self._last_error.rstrip('.')}." if self._last_error else "")
            )

    async def _wait_for(self, workers: set[asyncio.Task[None]]) -> None:
        while workers:
            finished, workers = await asyncio.wait(workers, return_when=asyncio.FIRST_COMPLETED)
            for worker in finished:
                worker.result()

    async def _run_worker(self, target: Target) -> None:
        """Generate pending samples until none remain or the server is abandoned."""
        while self._remaining and not target.is_abandoned:
            if (delay := target.backoff_until - self.clock()) > 0:
                await self.sleep(delay)
            elif self._pending:
                await self._generate(target, self._pending.popleft())
            else:
                # Other workers have the last samples and may return them to the queue.
                self._queue_changed.clear()
                await self._queue_changed.wait()

    async def _generate(self, target: Target, pending: PendingSample) -> None:
        started = self.clock()
        run = self.records.run
        parameters = run.request if run.seed is None else {**run.request, "seed": run.seed + pending.sample}
        try:
            completion = await target.generate(run.prompts[pending.task_id], **parameters)
        except YuanError as error:
            self._handle_failure(target, pending, error)
        else:
            target.last_response, target.failures = self.clock(), 0
            self._record(make_record(pending, completion, target.name, round(self.clock() - started, 3)))

    def _handle_failure(self, target: Target, pending: PendingSample, error: YuanError) -> None:
        """Record a permanent error, or return the sample to the queue."""
        now = self.clock()
        self._last_error = f"{target.name}: {error.code.name}: {error.message}"
        pending.attempts += 1
        if error.code is grpc.StatusCode.UNAVAILABLE and pending.unavailable_since is None:
            pending.unavailable_since = now
        is_permanent = error.code in PERMANENT or (error.code not in TRANSIENT and pending.attempts >= MAX_ATTEMPTS)
        if is_permanent or self._crashes_server(pending, target, now):
            details = {"code": error.code.name, "message": error.message}
            self._record(
                Record(pending.task_id, pending.sample, target=target.name, request_id=error.request_id, error=details)
            )
            return
        target.is_abandoned = now - target.last_response > self.patience
        self._back_off(target, now, error.retry_after)
        self._pending.append(pending)  # at the end, so that the other samples are tried first
        self._queue_changed.set()

    def _crashes_server(self, pending: PendingSample, target: Target, now: float) -> bool:
        """Return whether the server responds to other requests, but becomes unavailable whenever it runs this one."""
        since = pending.unavailable_since
        return since is not None and now - since > self.patience and target.last_response > since

    def _back_off(self, target: Target, now: float, retry_after: float | None) -> None:
        """Pause a server for the time it requests, at most the patience, or a delay that doubles with each failure."""
        if now < target.backoff_until:
            return  # this call started before the backoff
        delay: float = min(MIN_BACKOFF * 2.0 ** min(target.failures, 10), MAX_BACKOFF)
        target.failures += 1
        target.backoff_until = now + max(delay, min(retry_after or 0.0, self.patience))

    def _record(self, record: Record) -> None:
        self.records.append(record)
        self._remaining -= 1
        self.on_record(record)
        if not self._remaining:
            self._queue_changed.set()


def make_record(pending: PendingSample, completion: Completion, target: str, seconds: float) -> Record:
    """Return the record of a completion."""
    choice = completion.choices[0]
    return Record(
        pending.task_id,
        pending.sample,
        text=choice.text,
        finish_reason=choice.finish_reason,
        stop_string=choice.stop_string,
        stop_token_id=choice.stop_token_id,
        prompt_tokens=completion.usage.prompt_tokens,
        completion_tokens=completion.usage.completion_tokens,
        seed=completion.seed,
        request_id=completion.request_id,
        target=target,
        seconds=seconds,
    )


def add_fence_stop(request: dict[str, Any], probe: Sequence[Token]) -> dict[str, Any]:
    """Return the request with a stop at the closing fence.

    Args:
        request: the request's fields.
        probe: the tokens of FENCE_PROBE. In the published vocabulary the fence is one token, 28956, which is added to
            the stop tokens. In another vocabulary its text is added to the stop strings.
    """
    if probe and probe[-1].piece == FENCE:
        return {**request, "stop_token_ids": [probe[-1].id]}
    return {**request, "stop": [*request["stop"], FENCE_PROBE]}


def describe_request(run: Run) -> str:
    """Return a run's request as one line of text."""
    return ", ".join(f"{name} {value}" for name, value in run.request.items() if value is not False)
