"""One HTTP call: its body, its response, and the disconnection of its client."""

import asyncio
import json
import re
from collections.abc import Coroutine, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from yuan_grpc.server.core.access_log import TRACE_HEADERS
from yuan_grpc.server.core.generation_service import GenerationService, ResponseStream
from yuan_grpc.server.core.inflight import ANY_CONNECTION
from yuan_grpc.server.core.limits import MAX_REQUEST_ID
from yuan_grpc.server.errors import OverloadedError
from yuan_grpc.server.http.content_encoding import decode_body
from yuan_grpc.server.http.errors import StoppingError, TooLargeError, TooSlowError, error_response
from yuan_grpc.server.http.json_body import parse_body
from yuan_grpc.server.settings import HttpSettings
from yuan_grpc.server.settings.grpc_port import GrpcSettings
from yuan_grpc.v1 import yuan_pb2 as pb

MAX_BODY = GrpcSettings.max_request_bytes
"""Default of the maximum body size in bytes, the same as for a gRPC request."""

MIN_BODY_RATE = 8 * 2**10
"""Bytes of a body that extend the time for the others by a second."""

SMALL_BODY = 2**16
"""Bytes of a body that are read regardless of the limit on all bodies together."""

MAX_LARGE_BODIES = 2**28
"""Maximum bytes of all bodies that are being read, not counting the first `SMALL_BODY` of each."""

MAX_HEADER_ID = MAX_REQUEST_ID - len("-1023")
"""Maximum length of a request id in a header: each prompt of a body gets a suffix."""

_LINE_SEPARATORS = re.compile("[\x85\u2028\u2029]")
"""Characters that some clients treat as line ends, although JSON and server-sent events do not."""


def encode_json(content: Mapping[str, Any], *, is_ascii: bool = False, in_loop: bool = True) -> str:
    """Return content as JSON text.

    Args:
        in_loop: whether the event loop waits. Otherwise a slower encoder lets it run: the fast one holds Python's lock.
    """
    encoder = json.JSONEncoder(ensure_ascii=is_ascii, allow_nan=False, separators=(",", ":"))
    return encoder.encode(content) if in_loop else "".join(encoder.iterencode(content))


def encode_chunk(content: Mapping[str, Any], framing: "Framing", *, in_loop: bool = True) -> bytes:
    """Return a chunk of a stream with its delimiters; `in_loop` as for `encode_json`."""
    text = encode_json(content, is_ascii=framing.is_ascii, in_loop=in_loop)
    text = _LINE_SEPARATORS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
    return framing.prefix + text.encode() + framing.suffix


@dataclass
class AppState:
    """State shared by all calls.

    Attributes:
        service: the service that runs the requests.
        aliases: additional names of the served model.
        created: the server's start time, as a Unix timestamp in seconds.
        body_timeout: time for a client to send a body, in seconds, extended by `MIN_BODY_RATE`.
        max_body: maximum size of a body in bytes, the same as for a gRPC request.
        stopping: whether new calls are rejected.
        shutdown: an event that, once set, ends running calls.
        large_bodies: bytes of the bodies that are being read, which `MAX_LARGE_BODIES` limits.
    """

    service: GenerationService
    aliases: frozenset[str]
    created: int
    body_timeout: float = HttpSettings.body_timeout
    max_body: int = MAX_BODY
    stopping: bool = False
    shutdown: asyncio.Event = field(default_factory=asyncio.Event)
    large_bodies: int = 0


class ClientDisconnectedError(Exception):
    """The client has disconnected and receives no response."""


@dataclass(frozen=True)
class Framing:
    """The delimiters and the content type of a stream's chunks."""

    media_type: str | None
    prefix: bytes
    suffix: bytes
    is_ascii: bool


SERVER_SENT_EVENTS = Framing("text/event-stream; charset=utf-8", b"data: ", b"\n\n", is_ascii=False)
"""The framing that OpenAI streams use."""
NUL_TERMINATED = Framing(None, b"", b"\0", is_ascii=True)
"""The framing of `/generate`: no content type, and ASCII only, so that no packet splits a character."""


def _is_request_id(header: str) -> bool:
    """Return whether a header can be the id of a call; a proxy may send any other value."""
    return 0 < len(header) <= MAX_HEADER_ID and header.isascii() and header.isprintable()


class HttpCall:
    """An HTTP call with one JSON response, or with a stream of chunks.

    Attributes:
        state: the state shared by all calls.
        request_id: the request id, used in the log and in `x-request-id`: that of the body once it has been read, or
            of the header.
        connection: the connection on which `Abort` finds the request: any if the server generated its id, else none.
    """

    def __init__(self, state: AppState, scope: Scope, receive: Receive, send: Send) -> None:
        self.state = state
        self.connection: str | None = ANY_CONNECTION
        self.request_id = uuid4().hex
        self._header_fields = Headers(scope=scope)
        if _is_request_id(header := self._header_fields.get("x-request-id", "")):
            self._set_chosen_id(header)
        self._scope = scope
        self._receive = receive
        self._send = send
        self._framing: Framing | None = None

    async def read_json(self) -> dict[str, Any]:
        """Read the body's JSON object, regardless of its content type, and set its `request_id` if absent.

        Raises:
            InvalidRequestError: the body is not a JSON object, is too large, or arrives too slowly.
            OverloadedError: too many large bodies are being read.
            ClientDisconnectedError: the client disconnected before the end of the body.
        """
        encoding = self._header_fields.get("content-encoding", "")
        body = parse_body(decode_body(await self._read_body(), encoding, self.state.max_body))
        if not body.get("request_id"):
            return body | {"request_id": self.request_id}
        self._set_chosen_id(str(body["request_id"])[:MAX_REQUEST_ID])  # validation rejects longer ones later
        return body

    def _set_chosen_id(self, request_id: str) -> None:
        self.request_id = request_id
        self.connection = None  # an id that a client chose is not a secret, so `Abort` does not find it

    @property
    def trace_headers(self) -> dict[str, str]:
        """The headers of the caller's trace."""
        return {name: self._header_fields[name] for name in TRACE_HEADERS if name in self._header_fields}

    async def generate(self, request: pb.GenerateRequest) -> pb.GenerateResponse:
        """Return the response to a request of this call."""
        service = self.state.service
        return await service.generate(request, connection=self.connection)

    def stream(self, request: pb.GenerateRequest) -> AbstractAsyncContextManager[ResponseStream]:
        """Return the streamed response to a request of this call."""
        service = self.state.service
        return service.stream(request, connection=self.connection)

    async def _read_body(self) -> bytes:
        length = self._header_fields.get("content-length", "")
        if length.isdigit() and int(length) > self.state.max_body:
            raise TooLargeError(self.state.max_body)
        body, seconds = bytearray(), self.state.body_timeout
        start = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(seconds) as timeout:
                while await self._read_part(body):
                    timeout.reschedule(start + seconds + len(body) / MIN_BODY_RATE)
            return bytes(body)
        except TimeoutError:
            raise TooSlowError(seconds) from None
        finally:
            self.state.large_bodies -= max(0, len(body) - SMALL_BODY)

    async def _read_part(self, body: bytearray) -> bool:
        """Append the next part of the body; return whether there are more."""
        message = await self._receive()
        if message["type"] != "http.request":
            raise ClientDisconnectedError
        size_before = max(0, len(body) - SMALL_BODY)
        body += message.get("body", b"")
        self.state.large_bodies += max(0, len(body) - SMALL_BODY) - size_before
        if len(body) > self.state.max_body:
            raise TooLargeError(self.state.max_body)
        if len(body) > SMALL_BODY and self.state.large_bodies > MAX_LARGE_BODIES:
            raise OverloadedError(f"too many large bodies are being read (limit {MAX_LARGE_BODIES} bytes)")
        return bool(message.get("more_body", False))

    async def run_until_disconnect(self, work: Coroutine[Any, Any, None]) -> None:
        """Run the coroutine that sends the response; cancel it if the client disconnects or the grace period ends.

        Raises:
            ClientDisconnectedError: the client disconnected.
            StoppingError: the server's grace period ended.
        """
        task = asyncio.ensure_future(work)
        disconnect = asyncio.ensure_future(self._wait_for_disconnect())
        shutdown = asyncio.ensure_future(self.state.shutdown.wait())
        with self.state.service.inflight.track_unnamed():  # a stopping server waits until the response is written
            try:
                await asyncio.wait([task, disconnect, shutdown], return_when=asyncio.FIRST_COMPLETED)
                if not task.done():
                    raise ClientDisconnectedError if disconnect.done() else StoppingError
                await task
            finally:
                for future in (task, disconnect, shutdown):
                    future.cancel()
                await asyncio.wait([task, disconnect, shutdown])
                if not task.cancelled():
                    task.exception()  # retrieve it, so that asyncio does not log it as never retrieved

    async def _wait_for_disconnect(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def respond_encoded(self, body: bytes) -> None:
        """Send a complete response whose JSON is already encoded."""
        response = Response(body, headers=self._headers(), media_type="application/json")
        await response(self._scope, self._receive, self._send)

    async def respond(self, content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Send a complete JSON response."""
        response = JSONResponse(content, status, self._headers() | (headers or {}))
        await response(self._scope, self._receive, self._send)

    async def start_stream(self, framing: Framing) -> None:
        """Start a streamed response. Later errors are sent as a chunk."""
        self._framing = framing
        headers = self._headers() | {"cache-control": "no-cache"}
        if framing.media_type:
            headers["content-type"] = framing.media_type
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": 200, "headers": raw})

    async def write_chunk(self, content: Mapping[str, Any]) -> None:
        """Write a JSON chunk; return when the client has read most of what was written."""
        assert self._framing is not None
        await self.write_bytes(encode_chunk(content, self._framing))

    async def write_bytes(self, raw: bytes) -> None:
        """Write bytes to the stream without framing."""
        await self._send({"type": "http.response.body", "body": raw, "more_body": True})

    async def end_stream(self) -> None:
        """End a streamed response."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def send_error(self, error: Exception) -> None:
        """Send an error as the response, or as the last chunk of a stream that has started."""
        status, content, headers = error_response(error, self.request_id)
        if self._framing is None:
            await self.respond(content, status, headers)
        else:
            await self.write_chunk(content)
            await self.end_stream()

    def _headers(self) -> dict[str, str]:
        can_be_header = self.request_id and self.request_id.isascii() and self.request_id.isprintable()
        headers = {"x-request-id": self.request_id} if can_be_header else {}
        return headers | ({"connection": "close"} if self.state.stopping else {})
