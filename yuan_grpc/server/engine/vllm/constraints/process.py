"""The process that compiles constraints to find out what they cost, each in a forked process with limits.

Standard input is a socket that carries JSON lines. The first line has the tokenizer, as xgrammar serializes it, and
the options of JSON schemas. Each further one is a job, or the number of a job to cancel. Each job is answered with its
number and an outcome. The process ends when the socket is closed. `compiler.py` is the other end.
"""

import asyncio
import ctypes
import json
import os
import random
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xgrammar as xgr

from yuan_grpc.server.engine.vllm.constraints.grammars import compile_text, enforce, parse
from yuan_grpc.server.engine.vllm.constraints.regex import UnsupportedConstraintError

NICE = 10
"""Priority below that of the server and its engine, which this process and those that it forks yield to."""
MAX_LINE = 2**26
PR_SET_PDEATHSIG = 1
"""The signal that the kernel sends to this process when its parent has ended."""
MAX_PARSE_SECONDS = 0.1
"""Limit on parsing, which the server repeats once on its event loop."""
MAX_MASK_SECONDS = 0.1
MAX_SECONDS_PER_MASK = 0.006
"""Limits on the time to compute masks: this much in total, and this much more for each of them."""
MAX_MASKS = 96
TEXTS = 2
CANDIDATES = 4
DRAWS = 16
"""Numbers of texts to try and of their tokens, of tokens to draw at each position, and of draws while texts end."""

_ERRORS: dict[int, str] = {signal.SIGPROF: "too slow", signal.SIGXCPU: "too slow", signal.SIGKILL: "lost"}
"""Errors of jobs by the signal that ended them. Others are of a process that runs out of memory, or of stack."""

Job = dict[str, Any]


class Compiler:
    """Parses and compiles constraints, and computes their masks."""

    def __init__(self, setup: Job) -> None:
        self._json_options: dict[str, Any] = setup["json_options"]
        self._info = xgr.TokenizerInfo.deserialize_json(setup["tokenizer"])
        self._bitmask = xgr.allocate_token_bitmask(1, self._info.vocab_size)
        self._no_stop_tokens = np.full(self._bitmask.shape[1], 0xFFFFFFFF, np.uint32)
        for token in self._info.stop_token_ids:
            self._no_stop_tokens[token // 32] &= ~np.uint32(1 << token % 32)
        lengths = [len(piece) for piece in self._info.decoded_vocab]
        self._lengths = np.pad(np.array(lengths), (0, self._bitmask.numel() * 32 - len(lengths)))

    def outcome(self, kind: str, text: str) -> Job:
        """Return the equivalent of a constraint that the engine enforces, or what is wrong with it."""
        kind, text = enforce(kind, text, self._json_options)
        started = time.process_time()
        parse(kind, text, self._json_options)
        if time.process_time() - started > MAX_PARSE_SECONDS:
            return {"error": "slow to parse"}
        compiler = xgr.GrammarCompiler(self._info, max_threads=1, cache_enabled=False)
        compiled = compile_text(compiler, kind, text, self._json_options)
        is_fast = all(self._is_fast(xgr.GrammarMatcher(compiled), random.Random(seed)) for seed in range(TEXTS))
        return {"kind": kind, "text": text} if is_fast else {"error": "slow masks"}

    def _is_fast(self, matcher: xgr.GrammarMatcher, generator: random.Random) -> bool:
        """Return whether the masks of a text are computed fast. Each token is the most expensive one of a few."""
        seconds = _seconds(matcher.fill_next_token_bitmask, self._bitmask)
        token = -1
        for masks in range(MAX_MASKS):
            costs = self._costs(matcher, generator, token)
            if not costs:
                break
            token = max(costs, key=lambda token: costs[token])
            seconds += costs[token]
            if seconds > MAX_MASK_SECONDS + masks * MAX_SECONDS_PER_MASK:
                return False
            matcher.accept_token(token)
            matcher.fill_next_token_bitmask(self._bitmask)
        return True

    def _costs(self, matcher: xgr.GrammarMatcher, generator: random.Random, previous: int) -> dict[int, float]:
        """Return the seconds that a few tokens take, the longest and the previous one among them."""
        allowed = np.flatnonzero(np.unpackbits(self._words().view(np.uint8), bitorder="little"))
        if not len(allowed):
            return {}
        tokens = {int(allowed[np.argmax(self._lengths[allowed])])}
        if (allowed == previous).any():
            tokens.add(previous)
        for _ in range(DRAWS):
            drawn = generator.sample(range(len(allowed)), min(CANDIDATES, len(allowed)))
            tokens.update(int(allowed[index]) for index in drawn)
            costs = {token: cost for token in tokens if (cost := self._cost(matcher, token))}
            if costs:
                return costs
        return {}

    def _cost(self, matcher: xgr.GrammarMatcher, token: int) -> float:
        """Return the seconds to accept a token and compute the next mask; 0 if the text ends after it."""
        seconds = _seconds(matcher.accept_token, token) + _seconds(matcher.fill_next_token_bitmask, self._bitmask)
        can_continue = bool(self._words().any())
        matcher.rollback(1)
        return seconds if can_continue else 0

    def _words(self) -> np.ndarray[Any, Any]:
        """Return the mask without the tokens that end a text."""
        words: np.ndarray[Any, Any] = self._bitmask.numpy()[0].view(np.uint32) & self._no_stop_tokens
        return words


def _seconds(call: Callable[[Any], object], argument: object) -> float:
    started = time.thread_time()
    call(argument)
    return time.thread_time() - started


class Server:
    """Runs jobs in forked processes, and kills those that are cancelled."""

    def __init__(self, compiler: Compiler, writer: asyncio.StreamWriter) -> None:
        self._compiler = compiler
        self._writer = writer
        self._pids: dict[int, int] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def receive(self, message: Job) -> None:
        """Start or cancel a job."""
        if "cancel" not in message:
            number = message["id"]
            self._tasks[number] = asyncio.ensure_future(self._run(message))
            self._tasks[number].add_done_callback(lambda _: self._tasks.pop(number))
        elif pid := self._pids.get(message["cancel"]):
            os.kill(pid, signal.SIGKILL)
        elif task := self._tasks.get(message["cancel"]):  # it has not forked yet
            task.cancel()

    def close(self) -> None:
        """Kill all jobs."""
        for pid in self._pids.values():
            os.kill(pid, signal.SIGKILL)

    async def _run(self, job: Job) -> None:
        try:
            outcome = await self._outcome(job)
        except OSError:  # it could not be forked
            outcome = {"error": "lost"}
        self._writer.write(json.dumps(outcome | {"id": job["id"]}).encode() + b"\n")

    async def _outcome(self, job: Job) -> Job:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            _run_in_child(self._compiler, job, writing)
        os.close(writing)
        self._pids[job["id"]] = pid
        result = await _read_all(reading)
        del self._pids[job["id"]]
        _, status = os.waitpid(pid, 0)  # noqa: ASYNC222 - it has closed its pipe, so it is about to end
        if result:
            outcome: Job = json.loads(result)
            return outcome
        return {"error": _ERRORS.get(os.WTERMSIG(status), "too large")}


async def _read_all(descriptor: int) -> bytes:
    reader = asyncio.StreamReader()
    pipe = os.fdopen(descriptor, "rb")
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), pipe
    )
    try:
        return await reader.read()
    finally:
        transport.close()


def _run_in_child(compiler: Compiler, job: Job, writing: int) -> None:
    """Write the outcome of a job, and end this process."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        _limit(job)
        outcome = compiler.outcome(job["kind"], job["text"])
    except UnsupportedConstraintError as error:
        outcome = {"error": "unsupported", "reason": str(error)}
    except MemoryError:
        outcome = {"error": "too large"}
    except Exception as error:
        outcome = {"error": "too large" if "bad_alloc" in str(error) else "invalid", "reason": str(error)[:1000]}
    with os.fdopen(writing, "w") as pipe:
        json.dump(outcome, pipe)
    os._exit(0)


def _limit(job: Job) -> None:
    """Limit this process's processor time, and the memory that it has in addition to its present memory."""
    os.nice(job["nice"])
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, job["seconds"])
    resource.setrlimit(resource.RLIMIT_CPU, (int(job["seconds"]) + 2,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + job["bytes"],) * 2)


async def main() -> None:
    """Serve jobs until the socket is closed."""
    os.nice(NICE)
    connection = socket.socket(fileno=os.dup(sys.stdin.fileno()))
    reader, writer = await asyncio.open_connection(sock=connection, limit=MAX_LINE)
    server = Server(Compiler(json.loads(await reader.readline())), writer)
    while line := await reader.readline():
        server.receive(json.loads(line))
    server.close()


if __name__ == "__main__":
    asyncio.run(main())
