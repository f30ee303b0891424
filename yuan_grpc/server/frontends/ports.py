"""The ports that several front ends share."""

import socket
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType

from yuan_grpc.server.settings import Settings
from yuan_grpc.server.start_error import StartError


class Ports:
    """The reservation of the ports, in the supervisor. The front ends listen on them.

    A reserved port stays reserved while no front end listens on it, and a port of 0 is the same for all.

    Args:
        settings: the server's settings.
        count: the number of front ends.

    Attributes:
        settings: the settings with the ports that were reserved.
    """

    def __init__(self, settings: Settings, count: int) -> None:
        self.settings = settings
        self._count = count
        self._sockets = ExitStack()

    def __enter__(self) -> "Ports":
        """Reserve the ports.

        Raises:
            StartError: a port is in use.
        """
        settings = self.settings
        with ExitStack() as stack:
            port = self._reserve(stack, settings.port)
            http_port = None if settings.http_port is None else self._reserve(stack, settings.http_port)
            if settings.frontend_ports is not None:
                for number in range(self._count):
                    self._reserve(stack, settings.frontend_ports + number)
            self._sockets = stack.pop_all()
        self.settings = replace(settings, port=port, http_port=http_port)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Release the ports."""
        self._sockets.close()

    def settings_for(self, number: int) -> Settings:
        """Return the settings of one front end: a unix socket and a channelz port cannot be shared.

        The first front end keeps the path, so that a probe of it works for any number of them.
        """
        settings, path, port = self.settings, self.settings.grpc.unix_socket, self.settings.mesh.channelz_port
        if path is not None and number:
            settings = replace(
                settings, grpc=replace(settings.grpc, unix_socket=path.with_name(f"{path.name}.{number}"))
            )
        if port:
            settings = replace(settings, mesh=replace(settings.mesh, channelz_port=port + number))
        return settings

    def own_address(self, number: int) -> str | None:
        """Return the address of one front end alone; None if it has none."""
        first = self.settings.frontend_ports
        return None if first is None else self.settings.address_of(first + number)

    def _reserve(self, stack: ExitStack, port: int) -> int:
        """Bind a port without listening on it, so that no connection arrives here, and return its number."""
        host = self.settings.host
        try:
            addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, kind, protocol, _, address = min(addresses, key=lambda info: info[0] != socket.AF_INET)
            with socket.socket(family, kind, protocol) as probe:  # another server's port can be bound below, and shared
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
            reserved = stack.enter_context(socket.socket(family, kind, protocol))
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            reserved.bind(address)
        except OSError as error:
            raise StartError(f"cannot listen on {self.settings.address_of(port)}: {error.strerror}") from None
        number: int = reserved.getsockname()[1]
        return number
