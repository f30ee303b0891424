"""One of several processes that serve an engine which the supervisor has started."""

import asyncio
import logging
import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import uvloop

from yuan_grpc.server import log_queue, server
from yuan_grpc.server.core.admission import Admission
from yuan_grpc.server.core.inflight import InflightRequests
from yuan_grpc.server.core.shared_budget import SharedBudget
from yuan_grpc.server.engine.vllm import env
from yuan_grpc.server.engine.vllm.args import EngineOptions
from yuan_grpc.server.engine.vllm.engine import Shared, VllmEngine
from yuan_grpc.server.engine.vllm.lora import AdapterRequest
from yuan_grpc.server.engine.vllm.shared_engine import ClientLink
from yuan_grpc.server.engine.vllm.shared_lora import SharedLoraRegistry
from yuan_grpc.server.frontends.control import ControlChannel, Handler, PeerLostError
from yuan_grpc.server.settings import Settings
from yuan_grpc.server.start_error import StartError

EXIT_FAILURE = 1


@dataclass(frozen=True)
class FrontEndTask:
    """The task of a front end, as the supervisor passes it to the process.

    Attributes:
        settings: the server's settings, with the ports that the supervisor has reserved.
        options: the result of `parse_engine_flags`.
        link: the connection to the engine.
        budget: the memory of a `SharedBudget`.
        own_address: a second address to listen on, of this front end alone; None for none.
        loras: the loaded adapters, by name.
    """

    settings: Settings
    options: EngineOptions
    link: ClientLink
    budget: Any = field(repr=False)
    own_address: str | None = None
    loras: Mapping[str, AdapterRequest] = field(default_factory=dict)


def run(task: FrontEndTask, connection: Connection) -> NoReturn:
    """Serve until the supervisor asks to stop, and exit the process."""
    # Ctrl-C and the end of the terminal reach all processes. The supervisor decides what they mean.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    log_queue.configure(task.settings.log_level, task.settings.telemetry.log_format)
    if task.settings.log_level != "debug":
        logging.getLogger(server.__name__).setLevel(logging.WARNING)  # the supervisor logs its progress for all
    os.umask(env.OWN_UMASK)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        status = runner.run(_serve(task, connection))
    log_queue.drain()
    os._exit(status)  # without waiting for threads of libraries


async def _serve(task: FrontEndTask, connection: Connection) -> int:
    front_end = FrontEnd(task, connection)
    front_end.control.start()
    lost = asyncio.ensure_future(front_end.exit_without_supervisor())
    try:
        return await server.serve(task.settings, front_end.engine, front_end)
    except StartError as error:
        front_end.control.notify("fail", str(error))
        return EXIT_FAILURE
    finally:
        lost.cancel()


class _Engine(VllmEngine):
    """The shared engine, which is ready once all front ends are."""

    control: ControlChannel

    async def start(self) -> None:
        """Connect, run warm-up requests, and wait for the other front ends."""
        await super().start()
        await self.control.call("ready")


class FrontEnd:
    """The end of the control channel in a front end; see `Supervision`."""

    def __init__(self, task: FrontEndTask, connection: Connection) -> None:
        self.stop_requested = asyncio.Event()
        self.force_stop_requested = asyncio.Event()
        self.own_address = task.own_address
        self.admission = Admission(SharedBudget(task.budget, task.link.index))
        handlers: dict[str, Handler] = {
            "stop": self._stop,
            "force_stop": self._force_stop,
            "lose_engine": self._lose_engine,
            "abort": self._abort,
            "add_lora": self._add_lora,
            "discard_lora": self._discard_lora,
        }
        self.control = ControlChannel(connection, handlers)
        self._adapters = SharedLoraRegistry(
            task.options,
            task.settings.lora_folder,
            lambda name: self.control.call("load_lora", name),
            lambda name: self.control.call("unload_lora", name),
            self._release_lora,
        )
        for name, lora_request in task.loras.items():
            self._adapters.add(name, lora_request)
        self.engine = _Engine(task.options, owns_process=True, shared=Shared(task.link, self._adapters))
        self.engine.control = self.control
        self._inflight: InflightRequests | None = None

    def attach(self, inflight: InflightRequests) -> None:
        """Let calls be aborted from other front ends, once this one listens."""
        self._inflight = inflight
        inflight.abort_elsewhere = partial(self.control.call, "abort")
        self.control.notify("listening")

    async def exit_without_supervisor(self) -> None:
        """Exit the process once the supervisor has ended, because nothing else can stop it or replace the engine."""
        await self.control.closed.wait()
        log_queue.drain()
        os._exit(EXIT_FAILURE)

    async def _stop(self) -> None:
        self.stop_requested.set()

    async def _force_stop(self) -> None:
        self.force_stop_requested.set()

    async def _lose_engine(self) -> None:
        self.engine.set_lost()

    async def _abort(self, request_id: str, owner: str, of_all: bool) -> bool:
        return self._inflight is not None and await self._inflight.abort_here(request_id, owner, of_all=of_all)

    async def _release_lora(self, lora_name: str) -> None:
        with suppress(PeerLostError):
            await self.control.call("release_lora", lora_name)

    async def _add_lora(self, name: str, lora_request: AdapterRequest) -> None:
        self._adapters.add(name, lora_request)

    async def _discard_lora(self, name: str) -> None:
        await self._adapters.discard(name)
