"""Builds the server, starts it, waits, and stops it: in that order."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
from grpc_reflection.v1alpha import reflection

from yuan_grpc import __version__
from yuan_grpc.server.core.generation_service import GenerationService
from yuan_grpc.server.engine.protocol import Engine
from yuan_grpc.server.grpc import unknown_methods
from yuan_grpc.server.grpc.health import NAME as HEALTH_NAME
from yuan_grpc.server.grpc.health import Health
from yuan_grpc.server.grpc.interceptor import StatusInterceptor
from yuan_grpc.server.grpc.servicer import NAME, YuanService
from yuan_grpc.server.settings import Settings
from yuan_grpc.v1 import yuan_pb2_grpc

if TYPE_CHECKING:
    from yuan_grpc.server.http import Listener

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 1
"""For the last answers to be sent: gRPC does not tell when they have been."""

POLL_SECONDS = 0.5

CHANNEL_OPTIONS = [
    ("grpc.so_reuseport", 0),  # a second server on the same port is a mistake, and would get every other call
    # A caller who vanishes without a word is noticed within a minute, and frees what it held in the engine.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
]


def greeting(settings: Settings) -> str:
    """The first lines a person sees: what is served, where, and one command to try."""
    model = "the embedded demo: random weights, random answers" if settings.is_demo else settings.model
    where = settings.address if settings.port else f"{settings.host}, a free port"
    http = "" if settings.http_port is None else f"\n  http     {_http_address(settings)} (plaintext)"
    return f"""\
yuan-grpc {__version__}
  serves   {model}
  on       {where} (plaintext){http}
  try      buf curl --protocol grpc --http2-prior-knowledge \\
             -d '{{"prompt": "世界上最高的山是什么", "max_tokens": 32}}' http://{settings.address}/{NAME}/Generate
"""


def _http_address(settings: Settings) -> str:
    return settings.address_of(settings.http_port) if settings.http_port else f"{settings.host}, a free port"


async def serve(settings: Settings, engine: Engine) -> int:
    """Serves until told to stop.

    Returns:
        The process's exit status: 0 when it was told to stop, 1 when it could not start or lost its engine.
    """
    health, answers = Health(NAME), GenerationService(engine)
    doors = await _open(settings, answers, health)
    if doors is None:
        return 1
    server, port, http = doors
    told, hurried = _told_to_stop()
    await server.start()
    logger.info("listening on port %d; health says NOT_SERVING until the model has answered", port)
    if http:
        http.start()
        logger.info("HTTP calls on port %d", http.port)
    died = asyncio.ensure_future(_died(server))
    try:
        return await _work(engine, health, told, died)
    finally:
        if died.done():
            _end(engine)
        died.cancel()
        logger.info("stopping: calls in flight have %g seconds", settings.grace_seconds)
        await health.set_stopping()
        await _stop(server, http, answers, settings.grace_seconds, hurried)
        engine.stop()
        logger.info("stopped")


async def _open(
    settings: Settings, answers: GenerationService, health: Health
) -> "tuple[grpc.aio.Server, int, Listener | None] | None":
    """gRPC's server and its port, and the HTTP listener where there is to be one; None, said in the log, where an
    address cannot be had."""
    http, address = None, settings.address_of(settings.http_port or 0)
    try:
        http = _http_listener(settings, answers)
        address = settings.address
        return *await build(YuanService(answers), health, address), http
    except (OSError, RuntimeError):
        logger.error("cannot listen on %s: is it taken, or not an address of this machine?", address)
        if http:
            http.stop()
        return None


def _http_listener(settings: Settings, answers: GenerationService) -> "Listener | None":
    if settings.http_port is None:
        return None
    from yuan_grpc.server.http import Listener  # of no use to those who do without

    # What the original called a model: whatever it was started with.
    return Listener(answers, settings.host, settings.http_port, aliases=[settings.model])


async def _stop(
    server: grpc.aio.Server,
    http: "Listener | None",
    answers: GenerationService,
    grace_seconds: float,
    hurried: asyncio.Event,
) -> None:
    stopping = [asyncio.ensure_future(server.stop(grace_seconds))]
    if http:
        http.stop()
        stopping.append(asyncio.ensure_future(http.ended()))
    # Not for those who watch health, which they do for ever: once our own calls have ended, all others are.
    await _first(answers.inflight.wait_idle(), asyncio.sleep(grace_seconds), hurried.wait())
    await _first(asyncio.wait(stopping), hurried.wait(), asyncio.sleep(FLUSH_SECONDS))
    await server.stop(None)
    if http:
        await http.end()
    await asyncio.wait(stopping)
    await answers.inflight.wait_idle()


def _end(engine: Engine) -> NoReturn:
    """Ends the process without a look at its calls."""
    engine.stop()
    logging.shutdown()
    os._exit(1)


async def _died(server: Any) -> None:
    """Returns when gRPC's server has ended by itself, as grpcio's does at an error in its loop.

    Its calls are then left hanging, and ending them hangs or crashes the process, so there is no going on with another.
    """
    while server._server.is_running():  # noqa: ASYNC110 - grpcio tells of it in no other way
        await asyncio.sleep(POLL_SECONDS)


async def build(service: YuanService, health: Health, address: str) -> tuple[grpc.aio.Server, int]:
    """A server with all services, bound but not started, and its port.

    Raises:
        RuntimeError: the address cannot be bound.
    """
    server = unknown_methods.server([StatusInterceptor(NAME)], CHANNEL_OPTIONS)
    yuan_pb2_grpc.add_YuanServiceServicer_to_server(service, server)
    await health.attach(server)
    reflection.enable_server_reflection((NAME, HEALTH_NAME, reflection.SERVICE_NAME), server)
    return server, server.add_insecure_port(address)


async def _work(engine: Engine, health: Health, told: asyncio.Event, died: asyncio.Future[None]) -> int:
    began = time.monotonic()
    starting = asyncio.ensure_future(engine.start())
    if starting in await _first(starting, told.wait(), asyncio.shield(died)):
        try:
            await starting
        except Exception:
            logger.exception("the engine did not start")
            return 1
        await health.set_serving()
        logger.info("ready after %.1f s", time.monotonic() - began)
        lost = asyncio.ensure_future(engine.wait_until_dead())
        if lost in await _first(lost, told.wait(), asyncio.shield(died)):
            logger.error("the engine was lost")
            return 1
    if died.done():
        logger.error("gRPC's server has ended by itself, and all calls with it")
        return 1
    return 0


def _told_to_stop() -> tuple[asyncio.Event, asyncio.Event]:
    """An event that SIGTERM and SIGINT set, and one that they set when they come again."""
    told, hurried = asyncio.Event(), asyncio.Event()

    def tell() -> None:
        (hurried if told.is_set() else told).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, tell)
    return told, hurried


async def _first(*awaitables: Awaitable[object]) -> set[asyncio.Future[object]]:
    """Whichever ends first; the others are cancelled."""
    futures: list[asyncio.Future[object]] = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
    done = {future for future in futures if future.done()}
    for future in futures:
        future.cancel()
    return done
