"""The HTTP port, served in the same event loop as the gRPC port."""

import asyncio
import socket
import time
from collections.abc import Collection, Generator, Iterable
from contextlib import contextmanager, suppress
from functools import partial
from ipaddress import ip_address
from typing import Any, cast

import uvicorn

from yuan_grpc.server.core.generation_service import GenerationService
from yuan_grpc.server.http.acceptor import Acceptor, Tls, default_max_connections
from yuan_grpc.server.http.app import create_app
from yuan_grpc.server.http.call import AppState
from yuan_grpc.server.http.connection import Connection
from yuan_grpc.server.http.guard import ANY
from yuan_grpc.server.security.authentication import OPEN, Authenticator
from yuan_grpc.server.security.certificates import Certificates
from yuan_grpc.server.settings import HttpSettings
from yuan_grpc.server.settings.grpc_port import GrpcSettings

KEEP_ALIVE_SECONDS = 75
"""Time until an idle connection is closed, in seconds: longer than in clients and proxies, so that they close first."""

FLUSH_SECONDS = 1
"""Time to send errors to the calls that a shutdown ends, in seconds."""

DATE_SECONDS = 1
"""Interval between updates of the date in responses, in seconds."""

CLOSE_POLL_SECONDS = 0.01
"""Interval between checks that the last connection has closed, in seconds. uvicorn has no event for it."""

_SOCKET_OPTIONS = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    # Keepalive notices a vanished client within a minute, as over gRPC.
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2),
    # Keepalive does not notice a client that acknowledges but reads nothing for this time, in milliseconds.
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000),
    # asyncio sets TCP_NODELAY only on sockets that it creates. Without it each response took 40 ms longer.
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
)
"""Options of the listening socket, which accepted connections inherit."""


_DEFAULTS = HttpSettings()


class Listener:
    """A listening HTTP port, from `start` to `close`.

    Args:
        service: the service that runs the requests.
        host: the address to listen on; if a name has several addresses, an IPv4 address is preferred.
        port: the port to listen on, or 0 for any free port.
        aliases: additional names of the served model in the body of a request.
        settings: limits on connections, and the allowed hosts and origins.
        certificates: those of TLS; None for plaintext.
        max_body: maximum size of a body, in bytes.
        authenticator: identifies callers.
        shares_port: whether other processes may listen on the port, too.

    Raises:
        OSError: the address cannot be bound.
    """

    def __init__(
        self,
        service: GenerationService,
        host: str,
        port: int,
        aliases: Iterable[str] = (),
        settings: HttpSettings = _DEFAULTS,
        certificates: Certificates | None = None,
        max_body: int = GrpcSettings.max_request_bytes,
        authenticator: Authenticator = OPEN,
        *,
        shares_port: bool = False,
    ) -> None:
        self._socket = _bind_socket(host, port, shares_port)
        names = frozenset(alias.rstrip("/") or alias for alias in aliases)
        self._state = AppState(service, names, int(time.time()), settings.body_timeout, max_body)
        hosts = settings.allowed_hosts or _default_hosts(host, self._socket.getsockname()[0])
        config = uvicorn.Config(
            create_app(self._state, hosts, settings.allowed_origins, authenticator),
            workers=1,  # otherwise uvicorn reads WEB_CONCURRENCY
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
        )
        self._server = _Server(config, settings, certificates)
        self._serving: asyncio.Future[None] | None = None

    @property
    def port(self) -> int:
        """The port, also if any free port was requested."""
        port: int = self._socket.getsockname()[1]
        return port

    def start(self) -> None:
        """Start accepting calls."""
        self._serving = asyncio.ensure_future(self._server.serve(sockets=[self._socket]))

    def start_draining(self) -> None:
        """Refuse new calls with 503, also on new connections. Running calls continue."""
        self._state.stopping = True

    async def close(self) -> None:
        """End running calls with an error; return when all connections are closed and the engine requests freed."""
        self.start_draining()
        self._server.request_exit()
        self._state.shutdown.set()
        if self._serving is None:
            self._socket.close()
            return
        await asyncio.wait([self._serving], timeout=FLUSH_SECONDS)
        self._server.force_exit = True
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()  # of clients that do not read, or have not sent their whole request
        await self._serving


class _Server(uvicorn.Server):
    """uvicorn's server, which wakes once a second and closes within milliseconds; uvicorn polls each 100 ms."""

    def __init__(self, config: uvicorn.Config, settings: HttpSettings, certificates: Certificates | None) -> None:
        super().__init__(config)
        self._settings = settings
        self._certificates = certificates
        self._exit_requested = asyncio.Event()

    def request_exit(self) -> None:
        """Let `serve` shut down and return."""
        self.should_exit = True
        self._exit_requested.set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections on the only socket, within the limit."""
        assert sockets is not None
        state = self.server_state
        create_connection = partial(
            Connection, self._settings.header_timeout, config=self.config, server_state=state, app_state={}
        )
        limit = self._settings.max_connections or default_max_connections()
        connections = cast(Collection[Connection], state.connections)
        tls = Tls(self._certificates, self._settings.header_timeout) if self._certificates else None
        self.servers = cast(Any, [Acceptor(sockets[0], limit, connections, create_connection, tls)])
        self.started = True

    async def main_loop(self) -> None:
        """Update the date in responses until an exit is requested."""
        while not await self.on_tick(0):
            with suppress(TimeoutError):
                await asyncio.wait_for(self._exit_requested.wait(), DATE_SECONDS)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the socket and all connections, each after its response."""
        for server in self.servers:
            server.close()
            await server.wait_closed()
        for listening in sockets or ():
            listening.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        while (self.server_state.connections or self.server_state.tasks) and not self.force_exit:  # noqa: ASYNC110
            await asyncio.sleep(CLOSE_POLL_SECONDS)

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave signals to `yuan_grpc.server.server`."""
        yield


def _default_hosts(host: str, address: str) -> Collection[str]:
    """Return the allowed host names without a setting: any for a network address, and `host` for a local one."""
    return [host] if ip_address(address.partition("%")[0]).is_loopback else [ANY]


def _bind_socket(host: str, port: int, shares_port: bool) -> socket.socket:
    addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = min(addresses, key=lambda info: info[0] != socket.AF_INET)
    is_dual_stack = address[0] == "::" and socket.has_dualstack_ipv6()
    bound = socket.create_server(
        address, family=family, backlog=2048, dualstack_ipv6=is_dual_stack, reuse_port=shares_port
    )
    for level, option, value in _SOCKET_OPTIONS:
        bound.setsockopt(level, option, value)
    return bound
