"""Shutdown of the sockets of a gRPC port, before grpcio stops.

Why: when grpcio stops, it ends the calls that it has not passed to the application with CANCELLED, which clients do not
retry. This includes calls that arrive until the client has read the GOAWAY. On a closed connection, the same calls fail
with UNAVAILABLE. grpcio can neither send a GOAWAY while it accepts calls, nor close connections.
How: the process shuts its sockets down that are bound to the port. It finds them in `/proc/self/fd`.
Remove when: grpcio can drain connections before it stops.
"""

import os
import socket
from contextlib import suppress
from pathlib import Path

_FAMILIES = (socket.AF_INET, socket.AF_INET6)


def shut_down(port: int, path: Path | None = None) -> None:
    """Shut down the listening and the connected sockets of a local port, and those of a unix socket."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # it has been closed, or is not a connected socket
            descriptor = os.dup(int(name))  # another thread may close and reuse the original at any time
            try:
                _shut_down_if_bound(descriptor, port, path)
            finally:
                os.close(descriptor)


def _shut_down_if_bound(descriptor: int, port: int, path: Path | None) -> None:
    candidate = socket.socket(fileno=descriptor)
    try:
        name = candidate.getsockname()
        is_unix = candidate.family is socket.AF_UNIX and path is not None and name == str(path)
        if is_unix or (candidate.family in _FAMILIES and name[1] == port):
            candidate.shutdown(socket.SHUT_RDWR)
    finally:
        candidate.detach()
