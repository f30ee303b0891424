"""Startup and shutdown of the server, in order."""

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import grpc

from yuan_grpc import __version__
from yuan_grpc.server import log_queue
from yuan_grpc.server.core import access_log
from yuan_grpc.server.core.admission import Admission
from yuan_grpc.server.core.generation_service import GenerationService
from yuan_grpc.server.core.inflight import InflightRequests
from yuan_grpc.server.engine.protocol import Engine
from yuan_grpc.server.grpc import channelz, reflection, sockets, unknown_methods
from yuan_grpc.server.grpc.health import NAME as HEALTH_NAME
from yuan_grpc.server.grpc.health import Health
from yuan_grpc.server.grpc.interceptor import StatusInterceptor
from yuan_grpc.server.grpc.mesh import Mesh
from yuan_grpc.server.grpc.servicer import NAME, YuanService
from yuan_grpc.server.security.authentication import OPEN, Authenticator
from yuan_grpc.server.security.certificates import CertificateError, Certificates
from yuan_grpc.server.settings import Settings, demo
from yuan_grpc.server.settings.grpc_port import GrpcSettings
from yuan_grpc.server.signals import stop_signals
from yuan_grpc.server.start_error import StartError
from yuan_grpc.server.telemetry import setup as telemetry
from yuan_grpc.server.watchdog import Watchdog
from yuan_grpc.v1 import yuan_pb2_grpc

if TYPE_CHECKING:
    from yuan_grpc.server.http import Listener
    from yuan_grpc.server.telemetry.server_metrics import ServerMetrics

logger = logging.getLogger(__name__)

EXIT_FAILURE = 1

FLUSH_SECONDS = 1
"""Time for the last responses to be sent, in seconds. gRPC does not report when they are."""

SHORT_FLUSH_SECONDS = 0.2
"""Time for responses to calls that do not generate. They are small, and their end is not recorded."""

QUIET_SECONDS = 1
"""Time without refused calls after which all clients must have noticed the stop, in seconds."""

LAME_DUCK_SECONDS = 5
"""Maximum time for which a stopping server refuses new calls after its last call has ended, in seconds."""

POLL_SECONDS = 0.5
"""Interval between checks that the gRPC server is still running, in seconds."""

CHANNEL_OPTIONS = [
    # Keepalive detects a vanished client within a minute, and frees its engine requests. The kernel of a suspended
    # client still acknowledges packets, so only the ping's own timeout, a minute by default, detects it.
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


class Supervision(Protocol):
    """The supervisor of a server that is one of several front ends, in another process.

    Attributes:
        stop_requested: set when the server must stop.
        force_stop_requested: set when the server must end its calls.
        own_address: a second address to listen on, of this front end alone; None for none.
        admission: admits requests within limits that all front ends share.
    """

    stop_requested: asyncio.Event
    force_stop_requested: asyncio.Event
    own_address: str | None
    admission: Admission

    def attach(self, inflight: InflightRequests) -> None:
        """Let calls be aborted from other front ends. Called once the server listens."""


def startup_banner(settings: Settings) -> str:
    """Return the first lines of output: the model, the addresses, and a command to try."""
    model = demo.BANNERS.get(settings.model, settings.model)
    http = "" if settings.http_port is None else f"\n  http     {_displayed_address(settings, settings.http_port)}"
    socket = f"\n           unix:{settings.grpc.unix_socket}" if settings.grpc.unix_socket else ""
    metrics_port = settings.telemetry.metrics_port
    metrics = "" if metrics_port is None else f"\n  metrics  {_displayed_address(settings, metrics_port)}"
    return f"""\
yuan-grpc {__version__}
  model    {model}
  grpc     {_displayed_address(settings, settings.port)}{socket}{http}{metrics}
  try      {_example_command(settings)}
"""


def _example_command(settings: Settings) -> str:
    """Return a command that calls the server. If it needs more than an address, the command refers to the docs."""
    if settings.security.tls_cert_file or settings.security.token_file:
        return f"yuan-grpc generate 世界上最高的山是什么 --address {settings.address}; see docs/secure.md"
    return f"""buf curl --protocol grpc --http2-prior-knowledge \\
             -d '{{"prompt": "世界上最高的山是什么", "max_tokens": 32}}' http://{settings.address}/{NAME}/Generate"""


def _displayed_address(settings: Settings, port: int) -> str:
    address = settings.address_of(port) if port else f"{settings.host}, any free port"
    security = settings.security
    kind = "mutual TLS" if security.tls_client_ca_file else "TLS" if security.tls_cert_file else "plaintext"
    return f"{address} ({kind}{', tokens' if security.token_file else ''})"


async def serve(settings: Settings, engine: Engine, supervision: Supervision | None = None) -> int:
    """Serve until a stop signal.

    Args:
        supervision: the supervisor of this front end; None if there is only one.

    Returns:
        The exit status of the process: 0 after a stop signal, 1 if the server lost its engine.

    Raises:
        StartError: an address cannot be bound, or the engine cannot be started.
    """
    async with channelz.serve(settings.mesh.channelz_port):
        with _enable_telemetry(settings, serves_port=supervision is None) as metrics:
            names = (NAME, *settings.mesh.health_names)
            health = Health(*names, on_change=metrics.ready.set) if metrics else Health(*names)
            return await _serve(settings, engine, supervision, health, metrics)


async def _serve(
    settings: Settings,
    engine: Engine,
    supervision: Supervision | None,
    health: Health,
    metrics: "ServerMetrics | None",
) -> int:
    admission = supervision.admission if supervision else None
    generation_service = GenerationService(engine, admission, settings.message_interval)
    server, port, http = await _create_servers(settings, generation_service, health, supervision)
    if supervision:
        stop_requested, force_stop_requested = supervision.stop_requested, supervision.force_stop_requested
    else:
        stop_requested, force_stop_requested = handle_stop_signals()
    await server.start()
    logger.info("gRPC listening on port %d; health is NOT_SERVING until the engine is ready", port)
    if http:
        http.start()
        logger.info("HTTP listening on port %d", http.port)
    if supervision:
        supervision.attach(generation_service.inflight)
    grpc_failure = asyncio.ensure_future(_wait_for_grpc_failure(server))
    watchdog = _create_watchdog(settings, generation_service, engine, health, metrics)
    status, was_alive = EXIT_FAILURE, True
    try:
        status = await _run_engine(engine, health, stop_requested, grpc_failure, watchdog, metrics)
    finally:
        if grpc_failure.done():
            _exit_now(engine)
        grpc_failure.cancel()
        is_clean_stop = engine.is_ready and status == 0
        await health.set_stopping()
        if is_clean_stop:
            generation_service.is_withdrawing = True
            await _withdraw(engine, settings.lifecycle.withdraw_seconds, force_stop_requested)
            logger.info("stopping: running calls have %g seconds to finish", settings.grace_seconds)
        grace_seconds = settings.grace_seconds if is_clean_stop else 0
        engine_stop = asyncio.ensure_future(_stop_when_idle(engine, generation_service.inflight))
        await _stop_servers(server, port, http, generation_service, settings, grace_seconds, force_stop_requested)
        was_alive = await engine_stop or not is_clean_stop
        access_log.flush()
        if is_clean_stop:
            logger.info("stopped")
    if not was_alive:
        logger.error("the engine was lost while the last calls were running")
    return status if was_alive else EXIT_FAILURE


@contextmanager
def _enable_telemetry(settings: Settings, *, serves_port: bool) -> Iterator["ServerMetrics | None"]:
    """Enable the telemetry of the settings in the block.

    Raises:
        StartError: the address of the metrics cannot be bound.
    """
    with ExitStack() as stack:
        try:
            metrics = stack.enter_context(telemetry.enable(settings, NAME, serves_port=serves_port))
        except OSError:
            raise _address_error(settings, settings.telemetry.metrics_port or 0) from None
        yield metrics


def _create_watchdog(
    settings: Settings, service: GenerationService, engine: Engine, health: Health, metrics: "ServerMetrics | None"
) -> Watchdog:
    async def on_stall() -> None:
        service.is_stalled = True
        if metrics:
            metrics.stalls.inc()
        await health.set_stalled()

    async def on_recovery() -> None:
        service.is_stalled = False
        await health.set_serving()

    return Watchdog(engine, settings.lifecycle, on_stall, on_recovery)


async def _withdraw(engine: Engine, seconds: float, force_stop_requested: asyncio.Event) -> None:
    """Keep serving while load balancers learn that health is NOT_SERVING."""
    if seconds:
        logger.info("health is NOT_SERVING; new calls are served for %g seconds", seconds)
        await wait_for_first(asyncio.sleep(seconds), force_stop_requested.wait(), engine.wait_until_dead())


async def _stop_when_idle(engine: Engine, inflight: InflightRequests) -> bool:
    """Stop the engine once no call runs, while the last responses are being sent; return whether it was alive."""
    inflight.stop_admitting()
    await inflight.wait_idle()
    was_alive = engine.is_ready
    await asyncio.to_thread(engine.stop)
    return was_alive


async def _create_servers(
    settings: Settings, generation_service: GenerationService, health: Health, supervision: Supervision | None
) -> "tuple[grpc.aio.Server, int, Listener | None]":
    """Return the gRPC server, its port, and the HTTP listener if enabled.

    Raises:
        StartError: an address cannot be bound, or a package is missing.
    """
    http, port, mesh = None, settings.http_port or 0, Mesh(settings.mesh, generation_service)
    certificates, authenticator = _read_certificates(settings), Authenticator.from_settings(settings.security)
    shares_port = supervision is not None
    try:
        http = _create_http_listener(settings, generation_service, certificates, authenticator, shares_port=shares_port)
        port = settings.port
        server, bound_port = await create_server(
            YuanService(generation_service),
            health,
            settings.address,
            settings.grpc,
            certificates,
            authenticator,
            mesh,
            shares_port=shares_port,
        )
        if supervision and supervision.own_address:
            _add_port(server, supervision.own_address, certificates)
        return server, bound_port, http
    except (OSError, RuntimeError):
        if http:
            await http.close()
        raise _address_error(settings, port) from None


def _address_error(settings: Settings, port: int) -> StartError:
    return StartError(
        f"cannot listen on {settings.address_of(port)}: the port is in use, or this machine does not have the address; "
        "choose others with --host, --port, --http-port and --metrics-port"
    )


def _read_certificates(settings: Settings) -> Certificates | None:
    try:
        return Certificates.from_settings(settings.security)
    except CertificateError as error:
        raise StartError(str(error)) from None


def _create_http_listener(
    settings: Settings,
    generation_service: GenerationService,
    certificates: Certificates | None,
    authenticator: Authenticator,
    *,
    shares_port: bool,
) -> "Listener | None":
    if settings.http_port is None:
        return None
    from yuan_grpc.server.http import Listener  # imported only if HTTP is enabled

    # The original demo server accepted the value of `--model` as the model's name.
    return Listener(
        generation_service,
        settings.host,
        settings.http_port,
        [settings.model],
        settings.http,
        certificates,
        settings.grpc.max_request_bytes,
        authenticator,
        shares_port=shares_port,
    )


async def _stop_servers(
    server: grpc.aio.Server,
    port: int,
    http: "Listener | None",
    generation_service: GenerationService,
    settings: Settings,
    grace_seconds: float,
    force_stop_requested: asyncio.Event,
) -> None:
    """Refuse new calls, let the running ones finish, and close all connections.

    The gRPC server accepts calls until it stops, because stopping cancels those that it has not accepted.
    """
    inflight = generation_service.inflight
    if http:
        http.start_draining()
    # Wait only for generation calls: health watches never end by themselves.
    await wait_for_first(inflight.wait_idle(), asyncio.sleep(grace_seconds), force_stop_requested.wait())
    inflight.end_all()
    await wait_for_first(_wait_until_quiet(inflight), asyncio.sleep(LAME_DUCK_SECONDS), force_stop_requested.wait())
    sockets.shut_down(port, settings.grpc.unix_socket)
    await server.stop(None)
    if http:
        await http.close()
    await inflight.wait_idle()


async def _wait_until_quiet(inflight: InflightRequests) -> None:
    """Wait until the last responses are sent and clients have stopped calling."""
    remaining = max(SHORT_FLUSH_SECONDS, FLUSH_SECONDS - inflight.seconds_since_end)
    while remaining > 0:
        await asyncio.sleep(remaining)
        remaining = QUIET_SECONDS - inflight.seconds_since_refusal


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


_DEFAULTS = GrpcSettings()


def channel_options(settings: GrpcSettings, *, shares_port: bool) -> list[tuple[str, int]]:
    """Return the options of the gRPC server: the fixed ones, and the limits of the settings."""
    limits = {
        "grpc.so_reuseport": int(shares_port),
        "grpc.max_receive_message_length": settings.max_request_bytes,
        "grpc.max_send_message_length": settings.max_response_bytes,
        "grpc.max_concurrent_streams": settings.max_concurrent_streams,
        "grpc.max_connection_age_ms": _milliseconds(settings.max_connection_age),
        "grpc.max_connection_age_grace_ms": _milliseconds(settings.max_connection_age_grace),
    }
    return [*CHANNEL_OPTIONS, *((name, value) for name, value in limits.items() if value is not None)]


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else min(max(1, round(seconds * 1000)), 2**31 - 1)


async def create_server(
    service: YuanService,
    health: Health,
    address: str,
    settings: GrpcSettings = _DEFAULTS,
    certificates: Certificates | None = None,
    authenticator: Authenticator = OPEN,
    mesh: Mesh | None = None,
    *,
    shares_port: bool = False,
) -> tuple[grpc.aio.Server, int]:
    """Return a gRPC server with all services, bound but not started, and its port.

    Args:
        certificates: TLS certificates; None for plaintext. The unix socket is always plaintext.
        authenticator: identifies callers.
        shares_port: whether other processes may listen on the port, too. Otherwise, a second server on the same port
            would silently get half of the calls.

    Raises:
        RuntimeError: the address cannot be bound.
    """
    options = channel_options(settings, shares_port=shares_port)
    served, interceptors = (mesh.served, mesh.interceptors) if mesh else ((), ())
    status = StatusInterceptor(NAME, *served, authenticator=authenticator)
    server = unknown_methods.create_server([status, *interceptors], options)
    yuan_pb2_grpc.add_YuanServiceServicer_to_server(service, server)
    await health.attach(server)
    names, pools = mesh.attach(server) if mesh else ((), ())
    reflection.attach(server, (NAME, *names, HEALTH_NAME), pools)
    if settings.unix_socket is not None:
        server.add_insecure_port(f"unix:{settings.unix_socket}")
    return server, _add_port(server, address, certificates)


def _add_port(server: grpc.aio.Server, address: str, certificates: Certificates | None) -> int:
    """Listen on an address, and return its port."""
    if certificates is None:
        return server.add_insecure_port(address)
    return server.add_secure_port(address, certificates.grpc_credentials())


async def _run_engine(
    engine: Engine,
    health: Health,
    stop_requested: asyncio.Event,
    grpc_failure: asyncio.Future[None],
    watchdog: Watchdog,
    metrics: "ServerMetrics | None",
) -> int:
    """Start the engine and wait for a stop signal or a failure; return the exit status.

    Raises:
        StartError: the engine cannot be started.
    """
    starting = asyncio.ensure_future(engine.start())
    if starting in await wait_for_first(starting, stop_requested.wait(), asyncio.shield(grpc_failure)):
        try:
            await starting
        except StartError:
            raise
        except Exception as error:
            logger.exception("the engine failed to start")
            raise StartError(f"{type(error).__name__}: {error}") from error
        await health.set_serving()
        logger.info("ready after %.1f s", seconds_since_command())
        if metrics:
            metrics.describe(__version__, engine.info.name)
            metrics.start_seconds.set(seconds_since_command())
        engine_death = asyncio.ensure_future(engine.wait_until_dead())
        stall = asyncio.ensure_future(watchdog.run())
        done = await wait_for_first(engine_death, stall, stop_requested.wait(), asyncio.shield(grpc_failure))
        if engine_death in done or stall in done:
            logger.error("the engine was lost" if engine_death in done else "the engine is stalled; the server exits")
            return EXIT_FAILURE
    if grpc_failure.done():
        logger.error("the gRPC server stopped unexpectedly; its calls hang until the process exits")
        return EXIT_FAILURE
    return 0


def seconds_since_command() -> float:
    """Return the age of this process in seconds. It includes the imports."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def handle_stop_signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Return an event set by the first stop signal, and an event set by the second."""
    stop_requested, force_stop_requested = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (force_stop_requested if stop_requested.is_set() else stop_requested).set()

    for number in stop_signals():
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return stop_requested, force_stop_requested


async def wait_for_first(*awaitables: Awaitable[object]) -> set[asyncio.Future[object]]:
    """Wait for the first of the awaitables; return all that are done by then, and cancel the others.

    The others are cancelled too if this is cancelled: the loop would log their later errors with a traceback.
    """
    futures: list[asyncio.Future[object]] = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
        return {future for future in futures if future.done()}
    finally:
        for future in futures:
            future.cancel()
