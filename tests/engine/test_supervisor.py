"""The supervisor of several front ends, with an engine and front ends that the test controls."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio

from yuan_grpc.server.frontends.control import ControlChannel
from yuan_grpc.server.frontends.ports import Ports
from yuan_grpc.server.settings import Settings

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]
SETTINGS = Settings(model="m", host="127.0.0.1", port=0, grace_seconds=0, engine_flags=())
NO_LORA: Any = SimpleNamespace(
    config=SimpleNamespace(lora_config=None, model_config=SimpleNamespace(served_model_name="m"))
)


class FrontEnd:
    """The end of a control channel in a front end, and what the supervisor sees of its process."""

    def __init__(self, connection: Connection) -> None:
        self.sentinel, self._writer = os.pipe()
        self.pid, self.exitcode = os.getpid(), 0
        self.control = ControlChannel(connection, {"stop": self._exit, "abort": self._abort})
        self.abort_error: OSError | None = None

    def is_alive(self) -> bool:
        return False

    def join(self) -> None:
        os.close(self.sentinel)

    async def _exit(self) -> None:
        self.control.close()
        os.close(self._writer)

    async def _abort(self, request_id: str, owner: str, of_all: bool) -> bool:
        if self.abort_error:
            raise self.abort_error
        return False


class Engine:
    """An engine that accepts clients before the supervisor's own one is connected."""

    def __init__(self) -> None:
        self.front_ends: list[FrontEnd] = []
        self.accepts_clients, self.is_connected = asyncio.Event(), asyncio.Event()

    async def start(self, start_clients: Callable[[Sequence[Any]], object]) -> None:
        start_clients([SimpleNamespace(index=number) for number in range(2)])
        self.accepts_clients.set()
        await self.is_connected.wait()

    def start_process(self, target: object, arguments: tuple[object, Connection], name: str) -> FrontEnd:
        self.front_ends.append(FrontEnd(Connection(os.dup(arguments[1].fileno()))))
        return self.front_ends[-1]

    async def wait_until_dead(self) -> None:
        await asyncio.Event().wait()

    def stop(self) -> None:
        pass


@pytest_asyncio.fixture
async def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[Engine]:
    """The engine of a running supervisor, with two front ends that have started."""
    from yuan_grpc.server.frontends import supervisor  # imports vLLM, which warns then

    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    engine = Engine()
    monkeypatch.setattr(supervisor, "SharedEngine", lambda *_: engine)
    with Ports(SETTINGS, 2) as ports:
        running = asyncio.ensure_future(supervisor.Supervisor(ports, NO_LORA, 2).run())
        await engine.accepts_clients.wait()
        for front_end in engine.front_ends:
            front_end.control.start()
        yield engine
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


async def become_ready(engine: Engine) -> None:
    engine.is_connected.set()
    await asyncio.gather(*(front_end.control.call("ready") for front_end in engine.front_ends))


async def test_front_ends_serve_once_the_supervisor_can_use_the_engine(engine: Engine) -> None:
    controls = [front_end.control for front_end in engine.front_ends]
    are_ready = [asyncio.ensure_future(control.call("ready")) for control in controls]
    for control in controls:  # once this has returned, the supervisor has handled the calls before it
        assert not await control.call("abort", "request", "owner", False)
    assert not any(each.done() for each in are_ready)
    engine.is_connected.set()
    await asyncio.gather(*are_ready)


async def test_an_error_of_another_front_end_is_not_taken_for_its_result(engine: Engine) -> None:
    await become_ready(engine)
    first, second = engine.front_ends
    second.abort_error = OSError("broken")
    with pytest.raises(OSError, match="broken"):
        await first.control.call("abort", "request", "owner", False)
