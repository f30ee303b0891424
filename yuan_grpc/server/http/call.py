"""One HTTP call: its body, its answer, and the caller who may go away."""

import asyncio
import json
import re
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from yuan_grpc.server.core.generation_service import GenerationService
from yuan_grpc.server.core.limits import MAX_REQUEST_ID
from yuan_grpc.server.http.errors import StoppingError, TooLargeError, error_response
from yuan_grpc.server.http.json_body import decoded

MAX_BODY = 4 * 2**20
"""Bytes: as much as gRPC takes for a message."""

_LINE_ENDS = re.compile("[\x85\u2028\u2029]")
"""What some clients take for the end of a line, though JSON and the stream of events do not."""


@dataclass
class AppState:
    """What all calls share.

    Attributes:
        answers: what answers them.
        aliases: names that the served model goes by beside its own.
        created: when the server began, in seconds since 1970.
        stopping: whether new calls are refused.
        cut: when set, calls that run are ended.
    """

    service: GenerationService
    aliases: frozenset[str]
    created: int
    stopping: bool = False
    shutdown: asyncio.Event = field(default_factory=asyncio.Event)


class ClientDisconnectedError(Exception):
    """Nobody is left to answer."""


@dataclass(frozen=True)
class Framing:
    """How the chunks of a stream are kept apart."""

    media_type: str | None
    before: bytes
    after: bytes
    is_ascii: bool


EVENTS = Framing("text/event-stream; charset=utf-8", b"data: ", b"\n\n", is_ascii=False)
"""Server-sent events, as OpenAI streams."""
ENDED_BY_ZERO = Framing(None, b"", b"\0", is_ascii=True)
"""As `/generate` streams: without a content type, and in ASCII, so that the network splits no character."""


class HttpCall:
    """A call and its answer: whole, or in chunks that share a framing.

    Attributes:
        state: what all calls share.
        name: the request's, which the log and `x-request-id` tell; empty until the body has been read.
    """

    def __init__(self, state: AppState, scope: Scope, receive: Receive, send: Send) -> None:
        self.state = state
        self.name = ""
        self._scope = scope
        self._receive = receive
        self._send = send
        self._framing: Framing | None = None

    async def json(self) -> dict[str, Any]:
        """The body's object, whatever the content type, with a `request_id`, which names the call.

        Raises:
            InvalidRequestError: it is none, or too large.
            CallerGoneError: it never came.
        """
        body = decoded(await self._body())
        body["request_id"] = body.get("request_id") or uuid4().hex
        self.name = str(body["request_id"])[:MAX_REQUEST_ID]  # a longer one is refused
        return body

    async def _body(self) -> bytes:
        length = Headers(scope=self._scope).get("content-length", "")
        if length.isdigit() and int(length) > MAX_BODY:
            raise TooLargeError(MAX_BODY)
        body, more = bytearray(), True
        while more:
            message = await self._receive()
            if message["type"] != "http.request":
                raise ClientDisconnectedError
            body += message.get("body", b"")
            if len(body) > MAX_BODY:
                raise TooLargeError(MAX_BODY)
            more = message.get("more_body", False)
        return bytes(body)

    async def watched(self, work: Coroutine[Any, Any, None]) -> None:
        """Does the work that answers; ends it at once, and frees what it held, when the caller goes away or the server
        has no more time.

        Raises:
            CallerGoneError, StoppingError: it was ended.
        """
        working = asyncio.ensure_future(work)
        gone, shutdown = asyncio.ensure_future(self._gone()), asyncio.ensure_future(self.state.shutdown.wait())
        with (
            self.state.service.inflight.track_unnamed()
        ):  # until the answer is written: the server waits for that when it stops
            try:
                await asyncio.wait([working, gone, shutdown], return_when=asyncio.FIRST_COMPLETED)
                if not working.done():
                    raise ClientDisconnectedError if gone.done() else StoppingError
                await working
            finally:
                for task in (working, gone, shutdown):
                    task.cancel()
                await asyncio.wait([working, gone, shutdown])
                if not working.cancelled():
                    working.exception()  # which has been told, or is nobody's

    async def _gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def answer(self, content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Answers at once."""
        response = JSONResponse(content, status, self._headers() | (headers or {}))
        await response(self._scope, self._receive, self._send)

    async def begin(self, framing: Framing) -> None:
        """Begins a stream: from here on an error is a chunk of its own."""
        self._framing = framing
        headers = self._headers() | {"cache-control": "no-cache"}
        if framing.media_type:
            headers["content-type"] = framing.media_type
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": 200, "headers": raw})

    async def write(self, content: Mapping[str, Any]) -> None:
        """Writes a chunk, and returns when the caller has read nearly as far."""
        framing = self._framing
        assert framing is not None
        text = json.dumps(content, ensure_ascii=framing.is_ascii, allow_nan=False, separators=(",", ":"))
        text = _LINE_ENDS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
        await self.write_raw(framing.before + text.encode() + framing.after)

    async def write_raw(self, chunk: bytes) -> None:
        """Writes bytes as they are."""
        await self._send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def end(self) -> None:
        """Ends a stream."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def fail(self, error: Exception) -> None:
        """Tells the caller of an error, however far the answer is."""
        status, content, headers = error_response(error)
        if self._framing is None:
            await self.answer(content, status, headers)
        else:
            await self.write(content)
            await self.end()

    def _headers(self) -> dict[str, str]:
        headers = {"x-request-id": self.name} if self.name.isascii() and self.name.isprintable() and self.name else {}
        return headers | ({"connection": "close"} if self.state.stopping else {})
