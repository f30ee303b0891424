"""HTTP connections, with limits on what a client may take from others while it sends a request."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from yuan_grpc.server.security.certificates import certificate_names

CERTIFICATE_NAMES = "certificate_names"
"""Key of the state of a connection under which the names of its client certificate are."""

LINGER_SECONDS = 2
"""Time for a client to read a response that was sent before its whole body arrived, in seconds."""

FREE_CHUNKS = 2048
MIN_CHUNK = 256
"""Average size of the chunks of a body after the first `FREE_CHUNKS`, in bytes. Parsing a chunk takes 20 µs."""


class _Parser(h11.Connection):
    """A parser that refuses bodies of many tiny chunks."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER)
        self._chunk_credit = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunk_credit = FREE_CHUNKS * MIN_CHUNK
        elif isinstance(event, h11.Data):
            self._chunk_credit = min(self._chunk_credit + len(event.data), FREE_CHUNKS * MIN_CHUNK) - MIN_CHUNK
            if self._chunk_credit < 0:
                raise h11.RemoteProtocolError("too many small chunks")
        return event


class Connection(H11Protocol):
    """A connection that is closed if its client sends the head of a request too slowly.

    Args:
        header_timeout: time for a head, in seconds, from the connection or from its first byte.
        arguments: those of uvicorn.

    Attributes:
        waiting_since: the loop's time since which the connection waits for its client; see `is_waiting`.
    """

    def __init__(self, header_timeout: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.conn = _Parser()
        self.waiting_since = self.loop.time()
        self._header_timeout = header_timeout
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether the connection has no request, or only a part of one, and its client has read all responses."""
        is_incomplete = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        return is_incomplete and not self.transport.get_write_buffer_size() and not self.transport.is_closing()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time for the first head, and pass the client certificate to the application."""
        secure = transport.get_extra_info("ssl_object")
        self.app_state = {CERTIFICATE_NAMES: certificate_names(secure.getpeercert()) if secure else []}
        super().connection_made(transport)
        self._start_timer(self._header_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse the data, and limit the time for the remaining head."""
        was_idle = self.conn.their_state is h11.IDLE
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            if was_idle:
                self.waiting_since = self.loop.time()
                self._stop_timer()
        elif self._timer is None or not was_idle:
            self._start_timer(self._header_timeout)

    def on_response_complete(self) -> None:
        """Stop reading soon if the body has not arrived."""
        self.waiting_since = self.loop.time()
        if self.conn.their_state is h11.SEND_BODY:
            self._start_timer(LINGER_SECONDS)
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Respond to data that is not HTTP, unless a response has started."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
