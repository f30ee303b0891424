"""The metrics port: Prometheus' text format over HTTP, in threads, so that a busy event loop does not delay it."""

import os
import socket
import socketserver
from collections.abc import Callable, Iterable
from threading import BoundedSemaphore, Thread
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import REGISTRY, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.multiprocess import MultiProcessCollector

MAX_CONNECTIONS = 8
"""Maximum number of open connections; more are closed."""
CONNECTION_SECONDS = 10
"""Time that a client may stay silent, in seconds."""


def source_registry() -> CollectorRegistry:
    """Return the registry to read from: that of this process, or one that merges the metrics of several processes."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return REGISTRY
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    ProcessCollector(registry=registry)
    return registry


class _Handler(WSGIRequestHandler):
    timeout = CONNECTION_SECONDS

    def log_message(self, *_: Any) -> None:
        pass


class MetricsServer(socketserver.ThreadingMixIn, WSGIServer):
    """A server of metrics.

    Args:
        host, port: the address to listen on; port 0 for any free port.
        registry: the metrics; None for those of `source_registry`.

    Raises:
        OSError: the address cannot be bound.
    """

    daemon_threads = True

    def __init__(self, host: str, port: int, registry: CollectorRegistry | None = None) -> None:
        self.address_family = socket.getaddrinfo(host, port, flags=socket.AI_PASSIVE)[0][0]
        self._permits = BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__((host, port), _Handler)
        self._registry = registry or source_registry()
        self.set_app(self._respond)

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self.server_port

    def start(self) -> None:
        """Answer from now on, in a thread."""
        Thread(target=self.serve_forever, name="metrics", daemon=True).start()

    def close(self) -> None:
        """Stop listening. The server must have been started."""
        self.shutdown()
        self.server_close()

    def _respond(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Respond with the metrics as text, whatever the client accepts.

        As OpenMetrics, which Prometheus prefers, prometheus_client 0.26 writes `vllm:` names with an underscore.
        """
        if environ["PATH_INFO"] != "/metrics":
            start_response("404 Not Found", [("Content-Type", "text/plain"), ("Content-Length", "0")])
            return []
        body = generate_latest(self._registry)
        start_response("200 OK", [("Content-Type", CONTENT_TYPE_PLAIN_0_0_4), ("Content-Length", str(len(body)))])
        return [body]

    def server_bind(self) -> None:
        """Bind the socket, without the look-up of the host's name that the base class makes."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread, or close the connection if too many are open."""
        if self._permits.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer one connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._permits.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect or stay silent."""
