"""Builds the server, starts it, waits, and stops it: in that order."""

import asyncio
import logging
import signal
import sys
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


async def serve(settings: Settings, engine: Engine) -> int:
    """Serves until told to stop.

    Returns:
        The process's exit status: 0 when it was told to stop, 1 when it could not start or lost its engine.
    """
    health = Health(NAME)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    try:
        server, port = await build(engine, health, f"{host}:{settings.port}")
    except RuntimeError:
        print(f"yuan-grpc: cannot listen on {host}:{settings.port}: is something else there?", file=sys.stderr)
        return 1
    told = _told_to_stop()
    await server.start()
    print(_greeting(settings, f"{host}:{port}"), file=sys.stderr, flush=True)
    try:
        return await _work(engine, health, told)
    finally:
        logger.info("stopping: calls in flight have %g seconds", settings.grace_seconds)
        await health.stopping()
        await server.stop(settings.grace_seconds)
        engine.stop()
        logger.info("stopped")


async def build(engine: Engine, health: Health, address: str) -> tuple[grpc.aio.Server, int]:
    """A server with all services, bound but not started, and its port.

    Raises:
        RuntimeError: the address cannot be bound.
    """
    # Without SO_REUSEPORT: a second server on a port is a mistake, and would get every other call.
    server = grpc.aio.server(interceptors=[StatusInterceptor(NAME)], options=[("grpc.so_reuseport", 0)])
    yuan_pb2_grpc.add_YuanServiceServicer_to_server(YuanService(engine), server)
    await health.attach(server)
    reflection.enable_server_reflection((NAME, HEALTH_NAME, reflection.SERVICE_NAME), server)
    return server, server.add_insecure_port(address)


async def _work(engine: Engine, health: Health, told: asyncio.Event) -> int:
    began = time.monotonic()
    starting = asyncio.ensure_future(engine.start())
    if await _first(starting, told.wait()) is not starting:
        return 0
    try:
        await starting
    except Exception:
        logger.exception("the engine did not start")
        return 1
    await health.serving()
    logger.info("ready after %.1f s", time.monotonic() - began)
    lost = asyncio.ensure_future(engine.lost())
    if await _first(lost, told.wait()) is lost:
        logger.error("the engine was lost")
        return 1
    return 0


def _told_to_stop() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set; a second one ends the process as it would any other."""
    told = asyncio.Event()
    loop = asyncio.get_running_loop()

    def tell(number: signal.Signals) -> None:
        told.set()
        loop.remove_signal_handler(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, tell, number)
    return told


async def _first(one: Awaitable[object], other: Awaitable[object]) -> asyncio.Future[object]:
    """Whichever of two ends first; the other is cancelled."""
    futures = [asyncio.ensure_future(one), asyncio.ensure_future(other)]
    done, pending = await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
    for future in pending:
        future.cancel()
    return next(future for future in futures if future in done)


def _greeting(settings: Settings, address: str) -> str:
    model = "the embedded demo: random weights, random answers" if settings.is_demo else settings.model
    return f"""\
yuan-grpc {__version__}
  serves   {model}
  on       {address} (plaintext)
  try      buf curl --protocol grpc --http2-prior-knowledge \\
             -d '{{"prompt": "世界上最高的山是什么", "max_tokens": 32}}' http://{address}/{NAME}/Generate
loading the model; health says NOT_SERVING until it has answered"""
