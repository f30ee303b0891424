"""Free ports, and the processes that listen on one."""

import socket
from contextlib import ExitStack

import psutil


def free_port() -> int:
    """Return a port that is free."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port: int = unused.getsockname()[1]
        return port


def free_ports() -> int:
    """Return the first of two consecutive ports that are free."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first, ExitStack() as stack:
            port: int = first.getsockname()[1]
            try:
                stack.enter_context(socket.create_server(("127.0.0.1", port + 1)))
            except OSError:
                continue
            return port


def processes_on(port: int) -> list[psutil.Process]:
    """Return the processes that listen on a port."""
    listening = [each for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    return [psutil.Process(each.pid) for each in listening if each.laddr.port == port and each.pid]
