"""Free ports, and the processes that listen on one."""

import random
import socket
from contextlib import ExitStack

import psutil

CHOSEN = range(20_000, 32_000)
"""The kernel gives these to nobody who asks for any port. Otherwise, another test could get the same one, and share it:
gRPC servers listen with SO_REUSEPORT."""


def free_port() -> int:
    """Return a port that is free."""
    return free_ports(1)


def free_ports(count: int = 2) -> int:
    """Return the first of some consecutive ports that are free."""
    while True:
        first = random.SystemRandom().choice(CHOSEN)
        with ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
            return first


def processes_on(port: int) -> list[psutil.Process]:
    """Return the processes that listen on a port."""
    listening = [each for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    return [psutil.Process(each.pid) for each in listening if each.laddr.port == port and each.pid]
