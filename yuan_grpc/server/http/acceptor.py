"""The accept loop of the HTTP port, with a limit on connections."""

import asyncio
import logging
import resource
import socket
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from yuan_grpc.server.http.connection import Connection
from yuan_grpc.server.security.certificates import Certificates

logger = logging.getLogger(__name__)

RESERVED_FILES = 128
"""Open files that are left to the engine, the model and the log."""
MIN_CONNECTIONS = 8
MAX_CONNECTIONS = 4096
"""Range of the default limit on connections."""

ACCEPTS_PER_STEP = 16
"""Connections accepted in one step of the event loop."""
RETRY_SECONDS = 1
"""Time until accepting is retried after an error, in seconds."""
WARNING_SECONDS = 1
"""Minimum time between two warnings, in seconds."""

_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


def default_max_connections() -> int:
    """Return the limit on connections: half of the files that the process may open, less the reserved ones.

    The other half is for gRPC.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    available = MAX_CONNECTIONS if files == resource.RLIM_INFINITY else (files - RESERVED_FILES) // 2
    return min(max(available, MIN_CONNECTIONS), MAX_CONNECTIONS)


@dataclass(frozen=True)
class Tls:
    """The certificates of the port, and the time for a handshake, in seconds."""

    certificates: Certificates
    handshake_timeout: float

    def arguments(self) -> dict[str, Any]:
        """Return asyncio's arguments for the next connection."""
        return {"ssl": self.certificates.current().context, "ssl_handshake_timeout": self.handshake_timeout}


class Acceptor:
    """Accepts connections, and keeps their number within a limit.

    At the limit, a new connection replaces the one that has waited for its client the longest. If all connections have
    requests, the new one gets a 503. asyncio's own accept loop knows no limit, accepts the whole backlog in one step,
    and logs a traceback for each connection for which the process has no file descriptor.

    Args:
        listening: the listening socket.
        limit: the maximum number of connections.
        connections: the open connections.
        create_connection: a function that returns the protocol of a new connection.
        tls: None for plaintext. Connections with an unfinished handshake count towards the limit.
    """

    def __init__(
        self,
        listening: socket.socket,
        limit: int,
        connections: Collection[Connection],
        create_connection: Callable[[], Connection],
        tls: Tls | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._socket = listening
        self._limit = limit
        self._connections = connections
        self._create_connection = create_connection
        self._tls = tls
        self._opening: set[asyncio.Task[object]] = set()
        self._retry: asyncio.TimerHandle | None = None
        self._next_warning = 0.0
        listening.setblocking(False)
        self._resume()

    def close(self) -> None:
        """Stop accepting. Open connections remain."""
        if self._retry:
            self._retry.cancel()
        self._loop.remove_reader(self._socket)

    async def wait_closed(self) -> None:
        """Return when no accepted connection is still being opened."""
        if self._opening:
            await asyncio.wait(self._opening)

    def _resume(self) -> None:
        self._loop.add_reader(self._socket, self._accept_several)

    @property
    def _is_full(self) -> bool:
        return len(self._connections) + len(self._opening) >= self._limit

    def _accept_several(self) -> None:
        """Accept what has arrived, or make space for it."""
        try:
            if self._is_full:
                self._make_space()
            for _ in range(ACCEPTS_PER_STEP):
                if self._is_full:
                    return  # until the next step
                opening = self._loop.create_task(self._open(self._accept()))
                self._opening.add(opening)
                opening.add_done_callback(self._opening.discard)
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            pass  # no connection is left to accept
        except OSError as error:
            self._warn("cannot accept HTTP connections: %s; retrying each %d s", error.strerror, RETRY_SECONDS)
            self._close_longest_waiting()
            self._loop.remove_reader(self._socket)
            self._retry = self._loop.call_later(RETRY_SECONDS, self._resume)

    def _accept(self) -> socket.socket:
        accepted, _ = self._socket.accept()
        accepted.setblocking(False)
        return accepted

    def _make_space(self) -> None:
        """Close an idle connection, which takes a step of the event loop, or refuse the new one."""
        if self._opening:
            return  # until these are idle
        if self._close_longest_waiting():
            self._warn("the limit on HTTP connections is reached (%d); idle ones are closed", self._limit)
        else:
            self._warn("the limit on HTTP connections is reached (%d); new ones are refused", self._limit)
            self._refuse(self._accept())

    async def _open(self, accepted: socket.socket) -> None:
        with suppress(OSError):  # the client has disconnected already, or the handshake has failed
            arguments = self._tls.arguments() if self._tls else {}
            await self._loop.connect_accepted_socket(self._create_connection, accepted, **arguments)

    def _close_longest_waiting(self) -> bool:
        """Close the connection that has waited for its client the longest; return False if none is waiting."""
        waiting = [connection for connection in self._connections if connection.is_waiting]
        if waiting:
            min(waiting, key=lambda connection: connection.waiting_since).transport.abort()
        return bool(waiting)

    def _refuse(self, accepted: socket.socket) -> None:
        with accepted, suppress(OSError):
            with suppress(BlockingIOError):
                accepted.recv(2**16)  # unread data would reset the connection before the response is read
            accepted.send(_BUSY)

    def _warn(self, message: str, *args: object) -> None:
        """Log a warning, unless one was logged shortly before."""
        if self._loop.time() >= self._next_warning:
            self._next_warning = self._loop.time() + WARNING_SECONDS
            logger.warning(message, *args)
