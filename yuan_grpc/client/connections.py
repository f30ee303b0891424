"""The connections of a client, over which it spreads its calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any

CALLS_EACH = 16
"""Number of running calls from which on another connection is opened."""

MAX_CONNECTIONS = 64


@dataclass(eq=False)
class Connection:
    """A connection, and the number of its running calls."""

    channel: Any
    stub: Any
    running: int = 0


class Connections:
    """The open connections. A server with several processes serves each connection by one of them.

    Args:
        create: opens a connection. It connects at its first call.
        limit: the maximum number of connections.
    """

    def __init__(self, create: Callable[[], Connection], limit: int) -> None:
        self._create = create
        self._limit = limit
        self._open: list[Connection] = []
        self._by_id: dict[str, Connection] = {}
        self._lock = Lock()

    @property
    def opened(self) -> list[Connection]:
        """All open connections."""
        return self._open

    @property
    def first(self) -> Connection:
        """The first connection, which is opened if there is none."""
        with self._lock:
            return self._first()

    def acquire(self, rpc: str, request_id: str) -> Connection:
        """Return the connection for a call, which counts as running until `release`.

        An id that the caller has chosen is known on the connection of its call only, so `Abort` uses the same one.
        """
        with self._lock:
            if rpc == "Abort":
                connection = self._by_id.get(request_id) or self._first()
            else:
                connection = self._choose()
                if request_id:
                    self._by_id[request_id] = connection
            connection.running += 1
            return connection

    def release(self, connection: Connection, rpc: str, request_id: str) -> None:
        """Count a call as ended."""
        with self._lock:
            connection.running -= 1
            if rpc != "Abort":
                self._by_id.pop(request_id, None)

    def _choose(self) -> Connection:
        """Return the first connection with few calls, or another one, or that with the fewest."""
        for connection in self._open:
            if connection.running < CALLS_EACH:
                return connection
        if len(self._open) < self._limit:
            self._open.append(self._create())
            return self._open[-1]
        return min(self._open, key=lambda connection: connection.running)

    def _first(self) -> Connection:
        if not self._open:
            self._open.append(self._create())
        return self._open[0]
