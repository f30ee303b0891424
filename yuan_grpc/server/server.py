"""Startup and shutdown of the server, in order."""

import asyncio
import logging
import os
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import grpc

from yuan_grpc import __version__
from yuan_grpc.server import log_queue
from yuan_grpc.server.core import access_log
from yuan_grpc.server.core.generation_service import GenerationService
from yuan_grpc.server.core.inflight import InflightRequests
from yuan_grpc.server.engine.protocol import Engine
from yuan_grpc.server.grpc import reflection, sockets, unknown_methods
from yuan_grpc.server.grpc.health import NAME as HEALTH_NAME
from yuan_grpc.server.grpc.health import Health
from yuan_grpc.server.grpc.interceptor import StatusInterceptor
from yuan_grpc.server.grpc.servicer import NAME, YuanService
from yuan_grpc.server.settings import Settings, demo
from yuan_grpc.server.signals import stop_signals
from yuan_grpc.server.start_error import StartError
from yuan_grpc.v1 import yuan_pb2_grpc

if TYPE_CHECKING:
    from yuan_grpc.server.http import Listener

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 1
"""Time for the last responses to be sent, in seconds. gRPC does not report when they are."""

QUIET_SECONDS = 1
"""Time without a refused call after which no client expects an answer any more, in seconds."""

LAME_DUCK_SECONDS = 5
"""Limit on the time that a stopping server refuses calls after its last call has ended, in seconds."""

POLL_SECONDS = 0.5
"""Interval between checks that the gRPC server is still running, in seconds."""

CHANNEL_OPTIONS = [
    ("grpc.so_reuseport", 0),  # otherwise a second server on the same port would silently get half of the calls
    # Keepalive notices a vanished client within a minute, which frees its engine requests. A client that is only
    # suspended still acknowledges at the level of TCP: the ping's own timeout, a minute by default, notices it.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 500),  # clients may ping each second
    ("grpc.keepalive_permit_without_calls", 1),
    # By default grpcio cancels calls at random, and those that wait for 30 s, before the server sees them.
    ("grpc.server.max_pending_requests", 100_000),
    ("grpc.server.max_pending_requests_hard_limit", 200_000),
    ("grpc.server_max_unrequested_time_in_server", 24 * 60 * 60),
]


def startup_banner(settings: Settings) -> str:
    """Return the first lines of output: the model, the addresses, and a command to try."""
    model = demo.BANNERS.get(settings.model, settings.model)
    http = "" if settings.http_port is None else f"\n  http     {_displayed_address(settings, settings.http_port)}"
    return f"""\
yuan-grpc {__version__}
  model    {model}
  grpc     {_displayed_address(settings, settings.port)}{http}
  try      buf curl --protocol grpc --http2-prior-knowledge \\
             -d '{{"prompt": "世界上最高的山是什么", "max_tokens": 32}}' http://{settings.address}/{NAME}/Generate
"""


def _displayed_address(settings: Settings, port: int) -> str:
    address = settings.address_of(port) if port else f"{settings.host}, any free port"
    return f"{address} (plaintext)"


async def serve(settings: Settings, engine: Engine) -> int:
    """Serve until a stop signal.

    Returns:
        The exit status of the process: 0 after a stop signal, 1 if the server lost its engine.

    Raises:
        StartError: an address cannot be bound, or the engine cannot be started.
    """
    health, generation_service = Health(NAME), GenerationService(engine)
    server, port, http = await _create_servers(settings, generation_service, health)
    stop_requested, force_stop_requested = _handle_stop_signals()
    await server.start()
    logger.info("gRPC listening on port %d; health is NOT_SERVING until the engine is ready", port)
    if http:
        http.start()
        logger.info("HTTP listening on port %d", http.port)
    grpc_failure = asyncio.ensure_future(_wait_for_grpc_failure(server))
    try:
        return await _run_engine(engine, health, stop_requested, grpc_failure)
    finally:
        if grpc_failure.done():
            _exit_now(engine)
        grpc_failure.cancel()
        if was_serving := engine.is_ready:
            logger.info("stopping: running calls have %g seconds to finish", settings.grace_seconds)
        await health.set_stopping()
        engine_stop = asyncio.ensure_future(_stop_when_idle(engine, generation_service.inflight))
        await _stop_servers(server, port, http, generation_service, settings.grace_seconds, force_stop_requested)
        await engine_stop
        access_log.flush()
        if was_serving:
            logger.info("stopped")


async def _stop_when_idle(engine: Engine, inflight: InflightRequests) -> None:
    """Stop the engine once no call runs, while the last responses are being sent."""
    inflight.stop_admitting()
    await inflight.wait_idle()
    await asyncio.to_thread(engine.stop)


async def _create_servers(
    settings: Settings, generation_service: GenerationService, health: Health
) -> "tuple[grpc.aio.Server, int, Listener | None]":
    """Return the gRPC server, its port, and the HTTP listener if enabled.

    Raises:
        StartError: an address cannot be bound.
    """
    http, address = None, settings.address_of(settings.http_port or 0)
    try:
        http = _create_http_listener(settings, generation_service)
        address = settings.address
        return *await create_server(YuanService(generation_service), health, address), http
    except (OSError, RuntimeError):
        if http:
            await http.close()
        raise StartError(
            f"cannot listen on {address}: the port is in use, or this machine does not have the address; "
            "choose others with --host, --port and --http-port"
        ) from None


def _create_http_listener(settings: Settings, generation_service: GenerationService) -> "Listener | None":
    if settings.http_port is None:
        return None
    from yuan_grpc.server.http import Listener  # imported only if HTTP is enabled

    # The original demo server accepted the value of `--model` as the model's name.
    return Listener(generation_service, settings.host, settings.http_port, [settings.model], settings.http)


async def _stop_servers(
    server: grpc.aio.Server,
    port: int,
    http: "Listener | None",
    generation_service: GenerationService,
    grace_seconds: float,
    force_stop_requested: asyncio.Event,
) -> None:
    """Refuse new calls, let the running ones finish, and close all connections.

    The gRPC server accepts calls to the end: those that it has not accepted when it stops would be cancelled.
    """
    inflight = generation_service.inflight
    if http:
        http.start_draining()
    # Wait only for generation calls: health watches never end by themselves.
    await _wait_for_first(inflight.wait_idle(), asyncio.sleep(grace_seconds), force_stop_requested.wait())
    inflight.end_all()
    await _wait_for_first(_wait_until_quiet(inflight), asyncio.sleep(LAME_DUCK_SECONDS), force_stop_requested.wait())
    sockets.shut_down(port)
    await server.stop(None)
    if http:
        await http.close()
    await inflight.wait_idle()


async def _wait_until_quiet(inflight: InflightRequests) -> None:
    """Wait until the last responses are sent, and no client calls any more."""
    await asyncio.sleep(FLUSH_SECONDS)
    while (remaining := QUIET_SECONDS - inflight.seconds_since_refusal) > 0:  # noqa: ASYNC110 - a known time
        await asyncio.sleep(remaining)


def _exit_now(engine: Engine) -> NoReturn:
    """Exit the process without ending its calls."""
    engine.stop()
    log_queue.drain()
    os._exit(1)


async def _wait_for_grpc_failure(server: Any) -> None:
    """Return when the gRPC server has stopped by itself, as grpcio's does after an exception in its main loop.

    Its calls hang from then on. Ending them, or starting another server, hangs or crashes the process.
    """
    while server._server.is_running():  # noqa: ASYNC110 - grpcio has no event for it
        await asyncio.sleep(POLL_SECONDS)


async def create_server(service: YuanService, health: Health, address: str) -> tuple[grpc.aio.Server, int]:
    """Return a gRPC server with all services, bound but not started, and its port.

    Raises:
        RuntimeError: the address cannot be bound.
    """
    server = unknown_methods.create_server([StatusInterceptor(NAME)], CHANNEL_OPTIONS)
    yuan_pb2_grpc.add_YuanServiceServicer_to_server(service, server)
    await health.attach(server)
    reflection.attach(server, (NAME, HEALTH_NAME))
    return server, server.add_insecure_port(address)


async def _run_engine(
    engine: Engine, health: Health, stop_requested: asyncio.Event, grpc_failure: asyncio.Future[None]
) -> int:
    """Start the engine and wait for a stop signal or a failure; return the exit status.

    Raises:
        StartError: the engine cannot be started.
    """
    starting = asyncio.ensure_future(engine.start())
    if starting in await _wait_for_first(starting, stop_requested.wait(), asyncio.shield(grpc_failure)):
        try:
            await starting
        except StartError:
            raise
        except Exception as error:
            logger.exception("the engine failed to start")
            raise StartError(f"{type(error).__name__}: {error}") from error
        await health.set_serving()
        logger.info("ready after %.1f s", seconds_since_command())
        engine_death = asyncio.ensure_future(engine.wait_until_dead())
        if engine_death in await _wait_for_first(engine_death, stop_requested.wait(), asyncio.shield(grpc_failure)):
            logger.error("the engine was lost")
            return 1
    if grpc_failure.done():
        logger.error("the gRPC server stopped unexpectedly; its calls hang until the process exits")
        return 1
    return 0


def seconds_since_command() -> float:
    """Return the age of this process in seconds. It includes the imports."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _handle_stop_signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Return an event set by the first stop signal, and an event set by the second."""
    stop_requested, force_stop_requested = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (force_stop_requested if stop_requested.is_set() else stop_requested).set()

    for number in stop_signals():
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return stop_requested, force_stop_requested


async def _wait_for_first(*awaitables: Awaitable[object]) -> set[asyncio.Future[object]]:
    """Return those that are done when the first one is; cancel the others."""
    futures: list[asyncio.Future[object]] = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
    done = {future for future in futures if future.done()}
    for future in futures:
        future.cancel()
    return done
