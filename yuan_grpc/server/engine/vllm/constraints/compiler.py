"""The server's end of the process that compiles constraints."""

import asyncio
import json
import os
import socket
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import count
from subprocess import DEVNULL, Popen
from typing import Any

from vllm.v1.structured_output.utils import choice_as_grammar, grammar_is_likely_lark

from yuan_grpc.server.engine.types import Constraint
from yuan_grpc.server.engine.vllm.convert import SOURCE_LINE
from yuan_grpc.server.errors import InvalidRequestError, OverloadedError, UnavailableError, Violation

PROCESS = "yuan_grpc.server.engine.vllm.constraints.process"
MAX_LINE = 2**24
MAX_BYTES = 2**28
"""Memory to compile one constraint."""
WALL_SECONDS = 120
"""Maximum time from the start of a constraint's wait to the end of its compilation, in seconds."""
MAX_VERDICT_BYTES = 2**25
"""Memory for cached verdicts, and the memory of one without its text, in bytes."""
VERDICT_BYTES = 512

_RULES = {
    "too slow": "must be one that compiles in {seconds} s of processor time",
    "slow to parse": "must be one that is parsed fast: it has too many alternatives",
    "too large": f"must be one that compiles in {MAX_BYTES >> 20} MiB of memory",
    "slow masks": "must be one whose allowed tokens are computed fast: it has too many ways to match a text",
}


@dataclass(frozen=True)
class Lane:
    """Limits of a kind of compilation: the number at a time, and the processor time and niceness of each."""

    seconds: float
    nice: int
    permits: asyncio.Semaphore


@dataclass(frozen=True)
class Verdict:
    """The rule that a constraint violates, or the kind and text of the equivalent that the engine enforces."""

    rule: str | None
    kind: str
    text: bytes


@dataclass
class _Compilation:
    task: asyncio.Task[Verdict]
    waiters: int = 0


@dataclass
class ConstraintCompiler:
    """Compiles constraints in processes that can be killed, and caches the verdicts.

    Most constraints compile in the first lane. Those that do not are compiled again in the second one, so that a few
    expensive ones delay only each other.

    Args:
        setup: returns the first message to the process that compiles.
        seconds: processor time to compile one constraint.
    """

    setup: Callable[[], dict[str, Any]]
    seconds: float = 20
    _verdicts: OrderedDict[bytes, Verdict] = field(default_factory=OrderedDict)
    _verdict_bytes: int = 0
    _compilations: dict[bytes, _Compilation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lanes = (Lane(0.5, 0, asyncio.Semaphore(4)), Lane(self.seconds, 9, asyncio.Semaphore(2)))
        self._process = _Process(self.setup)

    async def check(self, constraint: Constraint) -> Constraint:
        """Return a constraint that the engine enforces and compiles within its budget. Cancelling ends the compilation.

        Raises:
            InvalidRequestError: the constraint has no such form.
            OverloadedError: too many constraints are being compiled.
        """
        if constraint.kind == "json_object":
            return constraint
        verdict = await self._verdict(*_kind_and_text(constraint))
        if verdict.rule is not None:
            name = f"structured_outputs.{constraint.kind}"
            raise InvalidRequestError([Violation(name, f"`{name}` {verdict.rule}")])
        if constraint.kind == "choice":
            return constraint
        kind: Any = "grammar" if verdict.kind == "lark" else verdict.kind
        return Constraint(kind, verdict.text.decode())

    def stop(self) -> None:
        """End the process that compiles."""
        self._process.stop()

    async def _verdict(self, kind: str, text: str) -> Verdict:
        """Return the verdict on a constraint, from a compilation that equal constraints share."""
        key = sha256(f"{kind}\0{text}".encode()).digest()
        if key in self._verdicts:
            self._verdicts.move_to_end(key)
            return self._verdicts[key]
        compilation = self._compilations.get(key)
        if compilation is None:
            task = asyncio.ensure_future(self._compile(key, kind, text))
            compilation = self._compilations[key] = _Compilation(task)
        compilation.waiters += 1
        try:
            return await asyncio.shield(compilation.task)
        finally:
            compilation.waiters -= 1
            if not compilation.waiters:
                compilation.task.cancel()
                if self._compilations.get(key) is compilation:
                    del self._compilations[key]

    async def _compile(self, key: bytes, kind: str, text: str) -> Verdict:
        outcome: dict[str, Any] = {}
        try:
            async with asyncio.timeout(WALL_SECONDS):
                for lane in self._lanes:
                    async with lane.permits:
                        outcome = await self._process.run(
                            {"kind": kind, "text": text, "seconds": lane.seconds, "nice": lane.nice, "bytes": MAX_BYTES}
                        )
                    if outcome.get("error") != "too slow":
                        break
        except TimeoutError:
            raise OverloadedError("too many constraints are being compiled") from None
        if outcome.get("error") == "lost":
            raise UnavailableError("the process that compiled the constraint was lost")
        verdict = Verdict(self._violated_rule(outcome), outcome.get("kind", ""), outcome.get("text", "").encode())
        self._cache_verdict(key, verdict)
        return verdict

    def _cache_verdict(self, key: bytes, verdict: Verdict) -> None:
        self._verdicts[key] = verdict
        self._verdict_bytes += VERDICT_BYTES + len(verdict.text)
        while self._verdict_bytes > MAX_VERDICT_BYTES:
            _, oldest = self._verdicts.popitem(last=False)
            self._verdict_bytes -= VERDICT_BYTES + len(oldest.text)

    def _violated_rule(self, outcome: dict[str, Any]) -> str | None:
        match outcome.get("error"):
            case None:
                return None
            case "unsupported":
                return str(outcome["reason"])
            case "invalid":
                return (
                    f"must be one that vLLM accepts: {SOURCE_LINE.sub('', outcome['reason']).strip().splitlines()[0]}"
                )
            case error:
                return _RULES[error].format(seconds=self.seconds)


def _kind_and_text(constraint: Constraint) -> tuple[str, str]:
    """Return the kind and the text that vLLM compiles."""
    specification = constraint.specification
    if isinstance(specification, Sequence) and not isinstance(specification, str):
        return "grammar", choice_as_grammar(list(specification))
    text = str(specification)
    return "lark" if constraint.kind == "grammar" and grammar_is_likely_lark(text) else constraint.kind, text


class _Process:
    """The process that compiles. The first job starts it, also after it was lost."""

    def __init__(self, setup: Callable[[], dict[str, Any]]) -> None:
        self._setup = setup
        self._numbers = count()
        self._outcomes: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._starting: asyncio.Task[asyncio.StreamWriter] | None = None
        self._reading: asyncio.Task[None] | None = None
        self._process: Popen[bytes] | None = None

    async def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """Return the outcome of a job. Cancelling kills it."""
        if self._starting is None:
            self._starting = asyncio.ensure_future(self._start())
        writer = await asyncio.shield(self._starting)  # other jobs wait for it, too
        number = next(self._numbers)
        outcome = self._outcomes[number] = asyncio.get_running_loop().create_future()
        writer.write(_line(job | {"id": number}))
        try:
            return await outcome
        finally:
            if outcome.cancelled():
                writer.write(_line({"cancel": number}))
            del self._outcomes[number]

    async def _start(self) -> asyncio.StreamWriter:
        try:
            setup = _line(await asyncio.to_thread(self._setup))
            ours, theirs = socket.socketpair()
            with theirs:
                self._process = _spawn(theirs)
            reader, writer = await asyncio.open_connection(sock=ours, limit=MAX_LINE)
        except BaseException:
            self._starting = None
            raise
        writer.write(setup)
        self._reading = asyncio.ensure_future(self._read(reader, writer))
        return writer

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                outcome = json.loads(line)
                future = self._outcomes.get(outcome["id"])
                if future and not future.done():
                    future.set_result(outcome)
        except ConnectionError:
            pass
        finally:
            writer.close()
            self._discard_process()

    def _discard_process(self) -> None:
        self._starting = None
        if self._process is not None:
            self._process.kill()  # its jobs end with it
            self._process.wait()
            self._process = None
        for future in self._outcomes.values():
            if not future.done():
                future.set_exception(UnavailableError("the process that compiles constraints was lost"))

    def stop(self) -> None:
        """End the process."""
        for task in (self._starting, self._reading):
            if task is not None:
                task.cancel()
        self._discard_process()


def _spawn(connection: socket.socket) -> Popen[bytes]:
    """Start the process in a group of its own, so that Ctrl-C does not end it before the server."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", PROCESS]
    return Popen(command, stdin=connection.fileno(), stdout=DEVNULL, env=environment, process_group=0)


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"
