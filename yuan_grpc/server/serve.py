"""Builds the server, starts it, waits, and stops it: in that order."""

import asyncio
import logging
import signal
import time
from collections.abc import Awaitable

import grpc
from grpc_reflection.v1alpha import reflection

from yuan_grpc import __version__
from yuan_grpc.server.errors import StatusInterceptor
from yuan_grpc.server.generation import Engine
from yuan_grpc.server.health import NAME as HEALTH_NAME
from yuan_grpc.server.health import Health
from yuan_grpc.server.service import NAME, YuanService
from yuan_grpc.server.settings import Settings
from yuan_grpc.v1 import yuan_pb2_grpc

logger = logging.getLogger(__name__)

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
    return f"""\
yuan-grpc {__version__}
  serves   {model}
  on       {where} (plaintext)
  try      buf curl --protocol grpc --http2-prior-knowledge \\
             -d '{{"prompt": "世界上最高的山是什么", "max_tokens": 32}}' http://{settings.address}/{NAME}/Generate
"""


async def serve(settings: Settings, engine: Engine) -> int:
    """Serves until told to stop.

    Returns:
        The process's exit status: 0 when it was told to stop, 1 when it could not start or lost its engine.
    """
    health, service = Health(NAME), YuanService(engine)
    try:
        server, port = await build(service, health, settings.address)
    except RuntimeError:
        logger.error("cannot listen on %s: is it taken, or not an address of this machine?", settings.address)
        return 1
    told, hurried = _told_to_stop()
    await server.start()
    logger.info("listening on port %d; health says NOT_SERVING until the model has answered", port)
    try:
        return await _work(engine, health, told)
    finally:
        logger.info("stopping: calls in flight have %g seconds", settings.grace_seconds)
        await health.stopping()
        stopping = asyncio.ensure_future(server.stop(settings.grace_seconds))
        # Not for those who watch health, which they do for ever: once our own calls have ended, all others are.
        await _first(service.idle(), asyncio.shield(stopping), hurried.wait())
        await server.stop(None)
        await stopping
        await service.idle()
        engine.stop()
        logger.info("stopped")


async def build(service: YuanService, health: Health, address: str) -> tuple[grpc.aio.Server, int]:
    """A server with all services, bound but not started, and its port.

    Raises:
        RuntimeError: the address cannot be bound.
    """
    server = grpc.aio.server(interceptors=[StatusInterceptor(NAME)], options=CHANNEL_OPTIONS)
    yuan_pb2_grpc.add_YuanServiceServicer_to_server(service, server)
    await health.attach(server)
    reflection.enable_server_reflection((NAME, HEALTH_NAME, reflection.SERVICE_NAME), server)
    return server, server.add_insecure_port(address)


async def _work(engine: Engine, health: Health, told: asyncio.Event) -> int:
    began = time.monotonic()
    starting = asyncio.ensure_future(engine.start())
    if starting not in await _first(starting, told.wait()):
        return 0
    try:
        await starting
    except Exception:
        logger.exception("the engine did not start")
        return 1
    await health.serving()
    logger.info("ready after %.1f s", time.monotonic() - began)
    lost = asyncio.ensure_future(engine.lost())
    if lost in await _first(lost, told.wait()):
        logger.error("the engine was lost")
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
