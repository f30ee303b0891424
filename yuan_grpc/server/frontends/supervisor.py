"""The process that starts the engine and its front ends, replaces those that die, and stops all of them."""

import asyncio
import logging
from collections.abc import Awaitable, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawArray
from typing import Any

from yuan_grpc.server import server
from yuan_grpc.server.core.shared_budget import SharedBudget
from yuan_grpc.server.engine.vllm.args import EngineOptions
from yuan_grpc.server.engine.vllm.lora import AdapterRequest, create_registry
from yuan_grpc.server.engine.vllm.shared_engine import ClientLink, SharedEngine
from yuan_grpc.server.engine.vllm.shared_lora import LoraLeader
from yuan_grpc.server.errors import ServiceError
from yuan_grpc.server.frontends import front_end
from yuan_grpc.server.frontends.control import ControlChannel, Handler, PeerLostError
from yuan_grpc.server.frontends.ports import Ports
from yuan_grpc.server.settings import Settings
from yuan_grpc.server.start_error import StartError
from yuan_grpc.server.telemetry import setup as telemetry

logger = logging.getLogger(__name__)

MAX_REPLACEMENTS = 16
"""Maximum number of replacements. After each, the engine keeps the sockets of the front end that died."""

STOP_SECONDS = 15
"""Time for a front end to exit after the grace period, in seconds."""


async def serve(settings: Settings, options: EngineOptions, count: int) -> int:
    """Serve with several front ends until a stop signal.

    Args:
        settings: the server's settings.
        options: the result of `parse_engine_flags`.
        count: the number of front ends.

    Returns:
        The exit status of the process: 0 after a stop signal, 1 if the engine or too many front ends were lost.

    Raises:
        StartError: an address cannot be bound, or the engine cannot be started.
    """
    with Ports(settings, count) as ports, ExitStack() as stack:
        if (port := settings.telemetry.metrics_port) is not None:
            stack.enter_context(telemetry.serve_metrics(settings.host, port))
        return await Supervisor(ports, options, count).run()


@dataclass(eq=False)
class _FrontEnd:
    """A front end, from the creation of its pipe to the end of its process.

    It starts with the adapters of `loras`, and gets all changes after that through its pipe.
    """

    number: int
    control: ControlChannel
    far_end: Connection
    exited: asyncio.Event
    loras: Mapping[str, AdapterRequest]
    link: ClientLink | None = None
    process: BaseProcess | None = None
    is_listening: bool = False
    is_ready: bool = False


class Supervisor:
    """The engine and its front ends.

    Args:
        ports: the ports to serve on.
        options: the result of `parse_engine_flags`.
        count: the number of front ends.
    """

    def __init__(self, ports: Ports, options: EngineOptions, count: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._ports = ports
        self._settings = ports.settings
        self._options = options
        self._engine = SharedEngine(options, count + MAX_REPLACEMENTS)
        self._budget: Any = RawArray("q", SharedBudget.size(count + MAX_REPLACEMENTS))
        self._loras = LoraLeader(create_registry(options, self._settings.lora_folder), self._engine)
        self._links: Iterator[ClientLink] = iter(())
        self._front_ends = [self._create_front_end(number) for number in range(count)]
        self._front_ends_ready = asyncio.Event()
        self._all_ready = asyncio.Event()
        self._failure: asyncio.Future[str] = self._loop.create_future()
        self._is_stopping = False
        self._tasks: set[asyncio.Task[Any]] = set()

    async def run(self) -> int:
        """Start, serve until a stop signal or a failure, and stop; return the exit status.

        Raises:
            StartError: the engine or a front end could not be started.
        """
        stop_requested, force_stop_requested = server.handle_stop_signals()
        starting = asyncio.ensure_future(self._start())
        try:
            if starting in await server.wait_for_first(starting, stop_requested.wait()):
                await starting
                logger.info("ready after %.1f s", server.seconds_since_command())
                return await self._wait_for_end(stop_requested)
            return 0
        finally:
            await self._stop_front_ends(force_stop_requested)
            await asyncio.to_thread(self._engine.stop)
            if self._all_ready.is_set():
                logger.info("stopped")

    async def _start(self) -> None:
        for each in self._front_ends:
            each.control.start()
        await self._await_unless_failed(self._engine.start(self._start_first_processes))
        await self._await_unless_failed(self._front_ends_ready.wait())
        self._all_ready.set()

    async def _await_unless_failed(self, awaitable: Awaitable[object]) -> None:
        """Await, or raise the cause if a front end fails first. It takes precedence over the engine's error."""
        future = asyncio.ensure_future(awaitable)
        future.add_done_callback(_retrieve)
        await server.wait_for_first(asyncio.shield(future), asyncio.shield(self._failure))
        if self._failure.done():
            future.cancel()
            raise StartError(self._failure.result())
        await future

    async def _wait_for_end(self, stop_requested: asyncio.Event) -> int:
        """Wait for a stop request, or for the loss of what cannot be replaced, and return the exit status."""
        engine_death = asyncio.ensure_future(self._engine.wait_until_dead())
        done = await server.wait_for_first(engine_death, asyncio.shield(self._failure), stop_requested.wait())
        if engine_death in done:
            logger.error("the engine was lost")
            self._notify_all("lose_engine")
            return 1
        if self._failure.done():
            logger.error("%s", self._failure.result())
            return 1
        return 0

    def _create_front_end(self, number: int) -> _FrontEnd:
        near_end, far_end = Pipe()
        created: _FrontEnd

        async def set_ready() -> None:
            created.is_ready = True
            if all(each.is_ready for each in self._front_ends):
                self._front_ends_ready.set()
            await self._all_ready.wait()  # also for this process: calls of a front end may need its engine client

        async def set_listening() -> None:
            created.is_listening = True
            if not self._all_ready.is_set() and all(each.is_listening for each in self._front_ends):
                self._log_ports()

        async def fail(cause: str) -> None:
            self._fail(cause)

        async def abort(request_id: str, owner: str, of_all: bool) -> bool:
            others = [each for each in self._front_ends if each is not created and each.is_ready]
            return any(await self._call_all(others, "abort", request_id, owner, of_all))

        async def release_lora(lora_name: str) -> None:
            assert created.link is not None
            await self._loras.release(created.link.index, lora_name)

        handlers: dict[str, Handler] = {
            "listening": set_listening,
            "ready": set_ready,
            "fail": fail,
            "abort": abort,
            "load_lora": self._load_lora,
            "unload_lora": self._unload_lora,
            "release_lora": release_lora,
        }
        control, loras = ControlChannel(near_end, handlers), self._loras.lora_requests
        created = _FrontEnd(number, control, far_end, asyncio.Event(), loras)
        return created

    def _log_ports(self) -> None:
        count, settings = len(self._front_ends), self._settings
        text = "gRPC listening on port %d with %d front ends; health is NOT_SERVING until they are ready"
        logger.info(text, settings.port, count)
        if settings.http_port is not None:
            logger.info("HTTP listening on port %d with %d front ends", settings.http_port, count)

    def _start_first_processes(self, links: Sequence[ClientLink]) -> Sequence[BaseProcess]:
        """Start the processes of all front ends, in the thread that starts the engine."""
        self._links = iter(links)
        return [self._start_process(each, next(self._links)) for each in self._front_ends]

    def _start_process(self, started: _FrontEnd, link: ClientLink) -> BaseProcess:
        started.link = link
        own_address = self._ports.own_address(started.number)
        settings = self._ports.settings_for(started.number)
        task = front_end.FrontEndTask(settings, self._options, link, self._budget, own_address, started.loras)
        arguments = (task, started.far_end)
        started.process = process = self._engine.start_process(front_end.run, arguments, f"front-end-{started.number}")
        started.far_end.close()
        self._loop.call_soon_threadsafe(self._loop.add_reader, process.sentinel, self._handle_exit, started)
        return process

    def _handle_exit(self, exited: _FrontEnd) -> None:
        assert exited.process is not None
        self._loop.remove_reader(exited.process.sentinel)
        exited.process.join()
        exited.control.close()
        telemetry.forget_process(exited.process.pid)
        exited.exited.set()
        if self._is_stopping:
            return
        if self._all_ready.is_set():
            self._start_task(self._replace_or_fail(exited))
        else:
            self._fail(f"a front end ended with status {exited.process.exitcode} while it started")

    async def _replace_or_fail(self, lost: _FrontEnd) -> None:
        try:
            await self._replace(lost)
        except Exception:
            logger.exception("front end %d cannot be replaced", lost.number)
            self._fail("the server stops, because a front end cannot be replaced")

    async def _replace(self, lost: _FrontEnd) -> None:
        """Free the resources of a front end that has died, and start another one."""
        assert lost.process is not None
        assert lost.link is not None
        link = next(self._links, None)
        status = lost.process.exitcode
        if link is None:
            self._fail(f"front end {lost.number} was lost (status {status}), after {MAX_REPLACEMENTS} replacements")
            return
        logger.error("front end %d was lost (status %s); starting another one", lost.number, status)
        SharedBudget(self._budget, lost.link.index).clear()
        await self._engine.abort_client(lost.link)
        await self._loras.release_all(lost.link.index)
        replacement = self._create_front_end(lost.number)
        self._front_ends[lost.number] = replacement
        replacement.control.start()
        await asyncio.to_thread(self._start_process, replacement, link)
        assert replacement.link is not None
        for name in self._loras.lora_requests:
            await self._loras.acquire(replacement.link.index, name)
        await self._engine.abort_client(lost.link)  # again: the engine may have read a request late

    async def _stop_front_ends(self, force_stop_requested: asyncio.Event) -> None:
        """Let the running calls finish, and wait until the processes have ended."""
        self._is_stopping = True
        if self._all_ready.is_set():
            logger.info("stopping: running calls have %g seconds to finish", self._settings.grace_seconds)
            self._notify_all("stop")
            exits = asyncio.ensure_future(self._wait_for_exits())
            grace = asyncio.sleep(self._settings.grace_seconds + STOP_SECONDS)
            await server.wait_for_first(asyncio.shield(exits), grace, force_stop_requested.wait())
            self._notify_all("force_stop")
            await server.wait_for_first(exits, asyncio.sleep(STOP_SECONDS))
        for each in self._front_ends:
            if each.process and each.process.is_alive():
                each.process.kill()
        await self._wait_for_exits()

    async def _wait_for_exits(self) -> None:
        for each in self._front_ends:
            if each.process:
                await each.exited.wait()

    async def _load_lora(self, name: str) -> None:
        try:
            lora_request: AdapterRequest = await self._loras.load(name)
        except ServiceError as error:
            if error.__cause__:  # the pipe does not transfer it
                logger.warning("the adapter %.256r: %r", name, error.__cause__)
            raise
        for each in self._front_ends:
            if each.link:
                await self._loras.acquire(each.link.index, name)
        await self._update_all("add_lora", name, lora_request)

    async def _unload_lora(self, name: str) -> None:
        await self._loras.unload(name)
        await self._update_all("discard_lora", name)

    async def _update_all(self, name: str, *arguments: object) -> None:
        """Call a function of all front ends, even if this is cancelled: they must have the same adapters.

        A front end that is starting gets the call before it serves. That can take long, so this does not wait for it.
        """
        ready = [each for each in self._front_ends if each.is_ready]
        for each in self._front_ends:
            if not each.is_ready:
                each.control.notify(name, *arguments)
        await asyncio.shield(self._start_task(self._call_all(ready, name, *arguments)))

    async def _call_all(self, front_ends: Sequence[_FrontEnd], name: str, *arguments: object) -> list[Any]:
        """Call a function of several front ends, and return the results of those that have not ended.

        Raises:
            Exception: the first exception of the function, once all calls have ended.
        """
        calls = (each.control.call(name, *arguments) for each in front_ends if not each.control.closed.is_set())
        results = await asyncio.gather(*calls, return_exceptions=True)
        results = [result for result in results if not isinstance(result, PeerLostError)]
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results

    def _start_task(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Return a new task, and keep it until it is done: the event loop alone does not."""
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _notify_all(self, name: str) -> None:
        for each in self._front_ends:
            each.control.notify(name)

    def _fail(self, cause: str) -> None:
        if not self._failure.done():
            self._failure.set_result(cause)


def _retrieve(future: asyncio.Future[Any]) -> None:
    """Mark the exception of a future as handled: after a stop nobody waits for it."""
    if not future.cancelled():
        future.exception()
