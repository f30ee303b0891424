"""The HTTP port: opened, served and closed beside gRPC's, in the same event loop."""

import asyncio
import socket
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager

import uvicorn

from yuan_grpc.server.core.generation_service import GenerationService
from yuan_grpc.server.http.app import create_app
from yuan_grpc.server.http.call import AppState

KEEP_ALIVE_SECONDS = 75
"""How long an idle connection is kept: longer than clients and proxies keep theirs, so that none is closed on them."""

FLUSH_SECONDS = 1
"""For the last words to calls that are cut."""

_OPTIONS = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    # A caller who vanishes without a word is noticed within a minute, as over gRPC.
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2),
    # asyncio sets this on sockets of its own making alone: without it each answer was 40 ms late.
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
)
"""Of the listening socket, which those of connections inherit."""


class Listener:
    """A port with the HTTP calls on it, from `start` to `end`.

    Args:
        answers: what answers them.
        host, port: where to listen; port 0 for any free one. Where a name has several addresses, an IPv4 one.
        aliases: names that the served model goes by beside its own.

    Raises:
        OSError: the address cannot be had.
    """

    def __init__(self, service: GenerationService, host: str, port: int, aliases: Iterable[str] = ()) -> None:
        self._socket = _bound(host, port)
        self._state = AppState(service, frozenset(aliases), created=int(time.time()))
        config = uvicorn.Config(
            create_app(self._state),
            workers=1,  # or else WEB_CONCURRENCY would be read
            http="h11",  # which bounds the size of headers
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
        )
        self._server = _Server(config)
        self._serving: asyncio.Future[None] | None = None

    @property
    def port(self) -> int:
        """The port that is listened on."""
        port: int = self._socket.getsockname()[1]
        return port

    def start(self) -> None:
        """Takes calls from now on."""
        self._serving = asyncio.ensure_future(self._server.serve(sockets=[self._socket]))

    def stop(self) -> None:
        """Takes no more calls, and closes what is idle; calls that run go on."""
        self._state.stopping = True
        self._server.should_exit = True
        if self._serving is None:
            self._socket.close()

    async def ended(self) -> None:
        """Returns when, after `stop`, the last answer has been sent and the last connection is closed."""
        if self._serving is not None:
            await asyncio.wait([self._serving])

    async def end(self) -> None:
        """Ends what still runs, telling the callers; returns when all that it held is free."""
        self.stop()
        self._state.shutdown.set()
        if self._serving is None:
            return
        await asyncio.wait([self._serving], timeout=FLUSH_SECONDS)
        self._server.force_exit = True
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()  # of those who do not read, or have not said what they want
        await self._serving


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leaves signals to `serve`."""
        yield


def _bound(host: str, port: int) -> socket.socket:
    addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = min(addresses, key=lambda info: info[0] != socket.AF_INET)
    is_both = address[0] == "::" and socket.has_dualstack_ipv6()
    bound = socket.create_server(address, family=family, backlog=2048, dualstack_ipv6=is_both)
    for level, option, value in _OPTIONS:
        bound.setsockopt(level, option, value)
    return bound
