"""A check that the server can listen on its addresses."""

import errno
import socket
from itertools import combinations

from yuan_grpc.server.settings import Settings
from yuan_grpc.server.start_error import StartError

LAST_PORT = 65_535


def check(settings: Settings) -> None:
    """Bind the ports, and release them.

    Raises:
        StartError: a port is taken or not allowed, or the host is not an address of this machine.
    """
    ports = _ports(settings)
    for (flag, port), (other_flag, other_port) in combinations(ports, 2):
        if port and port == other_port:
            raise StartError(f"{flag} and {other_flag} must differ, and both are {port}")
    for flag, number in ports:
        _check_port(settings, flag, number)


def _ports(settings: Settings) -> list[tuple[str, int]]:
    """Return the ports to listen on, each with its option."""
    metrics_port, first = settings.telemetry.metrics_port, settings.frontend_ports
    options = (("--port", settings.port), ("--http-port", settings.http_port), ("--metrics-port", metrics_port))
    ports = [(flag, port) for flag, port in options if port is not None]
    if first is None:
        return ports
    count = settings.frontends or 1
    if count == 1:
        raise StartError("--frontend-ports needs several front ends: set --frontends to 2 or more")
    if first > LAST_PORT + 1 - count:
        raise StartError(
            f"--frontend-ports must be at most {LAST_PORT + 1 - count} for {count} front ends, not {first}"
        )
    return [*ports, *(("--frontend-ports", first + number) for number in range(count))]


def _check_port(settings: Settings, flag: str, port: int) -> None:
    try:
        addresses = socket.getaddrinfo(settings.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise StartError(f"--host must be an address of this machine, not {settings.host!r}: {error}") from None
    for family, kind, protocol, _, address in addresses:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                probe.listen(1)
        except OSError as error:
            raise StartError(_explain(settings, flag, port, error)) from None


def _explain(settings: Settings, flag: str, port: int, error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return f"port {port} is in use: stop the program that listens on it, or choose another one with {flag}"
        case errno.EACCES:
            return f"this user must not listen on port {port}: choose 1024 or above with {flag}"
        case errno.EADDRNOTAVAIL:
            return f"--host must be an address of this machine, not {settings.host!r}; 0.0.0.0 stands for all"
    return f"cannot listen on {settings.address_of(port)}: {error.strerror}"
