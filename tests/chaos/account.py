"""The account of a scenario: what was sent, how each call ended, and what must hold."""

import asyncio
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
from fake_server import Options, fake_server
from ports import free_port

from yuan_grpc.v1 import yuan_pb2_grpc

FINISHED = "finished"
LEFT = "left"
"""Outcome of a call whose client went away."""
NOTHING = "nothing"
"""Outcome of a call that got no status in time. No scenario allows it."""
PATIENCE = 120.0
"""Time after which a call has got nothing, in seconds."""
OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0))


_IN_FLIGHT = re.compile(r"^yuan_grpc_calls_in_flight\{.*\} (\S+)$", re.MULTILINE)


class FakeServer:
    """A running server process with a fake engine."""

    def __init__(self, port: int, metrics_port: int, process: Any) -> None:
        self.port = port
        self.metrics_port = metrics_port
        self.address = f"127.0.0.1:{port}"
        self.process = process
        self._info = psutil.Process(process.pid)

    async def running(self) -> int:
        """Return the number of calls that it counts as running."""
        async with httpx.AsyncClient(trust_env=False, verify=False) as client:
            text = (await client.get(f"http://127.0.0.1:{self.metrics_port}/metrics")).text
        return sum(int(float(value)) for value in _IN_FLIGHT.findall(text))

    @property
    def memory(self) -> int:
        """Its resident memory, in bytes."""
        return int(self._info.memory_info().rss)

    @property
    def open_files(self) -> int:
        """The number of its open files."""
        return int(self._info.num_fds())

    @property
    def cpu_seconds(self) -> float:
        """The time that it has computed."""
        times = self._info.cpu_times()
        return float(times.user + times.system)


@dataclass
class Run:
    """One run of a scenario.

    Attributes:
        scale: factor of all numbers of clients and calls.
        folder: a folder for its files.
        outcomes: the number of calls for each end.
        facts: figures to print.
        broken: rules that did not hold.
    """

    scale: float
    folder: Path
    sent: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    facts: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def size(self, number: int, least: int = 2) -> int:
        """Return a number at the scale of this run."""
        return max(least, round(number * self.scale))

    def must(self, holds: bool, rule: str) -> None:
        """Note a rule that does not hold."""
        if not holds:
            self.broken.append(rule)

    def must_end(self, *allowed: str) -> None:
        """Note outcomes other than the allowed ones, and a sum that is not that of the calls sent."""
        others = {name: count for name, count in self.outcomes.items() if name not in allowed}
        self.must(not others, f"calls end as {', '.join(allowed)} only, not {others}")
        self.must(self.outcomes.total() == self.sent, f"{self.sent} calls have an end, not {self.outcomes.total()}")

    async def call(self, call: Awaitable[Any]) -> str:
        """Await a call, count it and return its end: `finished`, the name of a status, or `nothing`."""
        self.sent += 1
        end = FINISHED
        try:
            await asyncio.wait_for(call, PATIENCE)
        except grpc.aio.AioRpcError as error:
            end = error.code().name
        except TimeoutError:
            end = NOTHING
        self.outcomes[end] += 1
        return end

    def left(self) -> None:
        """Count a call whose client goes away."""
        self.sent += 1
        self.outcomes[LEFT] += 1

    @contextmanager
    def server(
        self, options: Options, credentials: grpc.ChannelCredentials | None = None, stderr: int | None = None
    ) -> Iterator[FakeServer]:
        """Run a server with a fake engine, and check that it ends only when it is stopped.

        Args:
            credentials: credentials of a client, if the server has TLS.
            stderr: the file for its log; a file in the folder by default.
        """
        port, metrics_port = free_port(), free_port()
        arguments = (*options.arguments, "--metrics-port", str(metrics_port))
        options = replace(options, arguments=arguments)
        with (
            open(self.folder / "log", "wb") as log,
            fake_server(port, options, credentials, stderr=stderr or log) as process,
        ):
            yield FakeServer(port, metrics_port, process)
            self.must(process.poll() in (None, 0), f"the server runs until it is stopped, not until {process.poll()}")
        text = (self.folder / "log").read_text(errors="replace")
        first = max(text.find("Traceback") - 200, 0)
        self.must("Traceback" not in text, f"the log has no traceback, not\n{text[first:][:4000]}")


def stub_of(channel: grpc.aio.Channel) -> Any:
    """Return a stub."""
    return yuan_pb2_grpc.YuanServiceStub(channel)


def connect(server: FakeServer) -> grpc.aio.Channel:
    """Return a channel with a connection of its own and without retries."""
    return grpc.aio.insecure_channel(server.address, OWN_CONNECTION)


async def read_all(stream: Any) -> None:
    """Read a stream to its end; raise its error."""
    while await stream.read() is not grpc.aio.EOF:
        pass


async def is_true_within(condition: Callable[[], Awaitable[bool]], seconds: float = 30.0) -> bool:
    """Return whether a condition holds within a time."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while not await condition():
        if loop.time() > end:
            return False
        await asyncio.sleep(0.05)
    return True


async def is_idle(server: FakeServer) -> bool:
    """Return whether no call runs on a server, or none within 30 seconds."""

    async def has_none() -> bool:
        return await server.running() == 0

    return await is_true_within(has_none)
