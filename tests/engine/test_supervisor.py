"""The supervisor of several front ends, with an engine and front ends that the test controls."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio

from yuan_grpc.server.frontends.control import ControlChannel, Handler
from yuan_grpc.server.frontends.ports import Ports
from yuan_grpc.server.settings import Settings

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]
SETTINGS = Settings(model="m", host="127.0.0.1", port=0, grace_seconds=0, engine_flags=())
OPTIONS: Any = SimpleNamespace(
    config=SimpleNamespace(
        lora_config=SimpleNamespace(max_cpu_loras=1), model_config=SimpleNamespace(served_model_name="m")
    )
)


class FrontEnd:
    """The end of a control channel in a front end, and what the supervisor sees of its process."""

    def __init__(self, connection: Connection) -> None:
        self.sentinel, self._writer = os.pipe()
        self.pid, self.exitcode = os.getpid(), 0
        handlers: dict[str, Handler] = {"stop": self.exit, "abort": self._abort, "add_lora": self._add_lora}
        self.control = ControlChannel(connection, handlers)
        self.abort_error: OSError | None = None
        self.can_add, self.is_adding, self.has_added = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.can_add.set()

    def is_alive(self) -> bool:
        return False

    def join(self) -> None:
        os.close(self.sentinel)

    async def exit(self) -> None:
        if not self.control.closed.is_set():
            self.control.close()
            os.close(self._writer)

    async def _abort(self, request_id: str, owner: str, of_all: bool) -> bool:
        if self.abort_error:
            raise self.abort_error
        return False

    async def _add_lora(self, name: str, lora_request: object) -> None:
        self.is_adding.set()
        await self.can_add.wait()
        self.has_added.set()


class Engine:
    """An engine that accepts clients before the supervisor's own one is connected."""

    def __init__(self) -> None:
        self.front_ends: list[FrontEnd] = []
        self.started: asyncio.Queue[FrontEnd] = asyncio.Queue()
        self.is_connected = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    async def start(self, start_clients: Callable[[Sequence[Any]], object]) -> None:
        start_clients([SimpleNamespace(index=number) for number in range(3)])
        await self.is_connected.wait()

    def start_process(self, target: object, arguments: tuple[object, Connection], name: str) -> FrontEnd:
        self.front_ends.append(front_end := FrontEnd(Connection(os.dup(arguments[1].fileno()))))
        self._loop.call_soon_threadsafe(self.started.put_nowait, front_end)
        return front_end

    async def abort_client(self, link: object) -> None:
        pass

    async def add_lora(self, lora_request: object) -> bool:
        return True

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
    (tmp_path / "style").mkdir()
    (tmp_path / "style" / "adapter_config.json").touch()
    with Ports(replace(SETTINGS, lora_folder=tmp_path), 2) as ports:
        running = asyncio.ensure_future(supervisor.Supervisor(ports, OPTIONS, 2).run())
        for _ in range(2):
            (await engine.started.get()).control.start()
        yield engine
        running.cancel()
        await asyncio.sleep(0)  # the supervisor is stopping, and does not replace what ends now
        for front_end in engine.front_ends:
            await front_end.exit()
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


async def test_an_adapter_reaches_all_front_ends_although_its_load_is_cancelled(engine: Engine) -> None:
    await become_ready(engine)
    first, second = engine.front_ends
    second.can_add.clear()
    load = asyncio.ensure_future(first.control.call("load_lora", "style"))
    await second.is_adding.wait()
    load.cancel()
    await first.control.call("abort", "request", "owner", False)  # the supervisor has handled the cancellation then
    second.can_add.set()
    await second.has_added.wait()


async def test_calls_do_not_wait_for_a_front_end_that_is_starting(engine: Engine) -> None:
    await become_ready(engine)
    first, lost = engine.front_ends
    await lost.exit()
    replacement = await engine.started.get()
    assert not await first.control.call("abort", "request", "owner", False)
    await first.control.call("load_lora", "style")
    replacement.control.start()
    await replacement.has_added.wait()
