"""A server interceptor that parses requests, maps exceptions to statuses, and writes the access log."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from yuan_grpc.server.core.access_log import TRACE_HEADERS, log_call, log_error
from yuan_grpc.server.errors import InvalidRequestError, ServiceError, Violation, to_status, to_trailers
from yuan_grpc.server.grpc import orca, request_id
from yuan_grpc.server.grpc.callers import identify, required_scope
from yuan_grpc.server.security.authentication import OPEN, Authenticator
from yuan_grpc.server.security.identity import Identity, Scope, calling_as

GZIP_REQUEST = ("response-encoding", "gzip")
"""Metadata of a call whose response is to be compressed. gRPC does not pass on how the request was."""

_GUARDED = {
    "/grpc.reflection.": (Scope.ADMIN, "reflection"),
    f"/{orca.SERVICE}/": (Scope.GENERATE, "load reports"),
}
"""Services that others define, by the start of their methods: the scope they need, and their name in messages."""

Method = Callable[[Any, Any], Awaitable[Any]]
Deserializer = Callable[[bytes], Any]


class StatusInterceptor(grpc.aio.ServerInterceptor):
    """An interceptor that identifies callers, and turns handlers' exceptions into statuses.

    Handlers never abort a call themselves. Health answers everyone, since probes have no token.

    Args:
        services: the services whose calls are wrapped. Reflection and load reports are guarded in any case.
        authenticator: identifies callers.
    """

    def __init__(self, *services: str, authenticator: Authenticator = OPEN) -> None:
        self._prefixes = tuple(f"/{service}/" for service in services)
        self._authenticator = authenticator

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Wrap the handlers of our services, of reflection and of load reports; return those of health unchanged."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        for prefix, (scope, action) in _GUARDED.items():
            if handler is not None and method.startswith(prefix):
                return self._guard(handler, scope, action)
        if handler is None or not method.startswith(self._prefixes):
            return handler
        # Parse messages inside the wrapper: grpcio reports one it cannot parse as UNKNOWN, with a traceback.
        deserialize, serialize = handler.request_deserializer, handler.response_serializer
        name = method.rpartition("/")[2]
        assert deserialize is not None
        if handler.stream_stream:
            batch = self._wrap(handler.stream_stream, _parse_each(deserialize), name)
            return grpc.stream_stream_rpc_method_handler(batch, response_serializer=serialize)
        if handler.unary_stream:
            stream = self._wrap(handler.unary_stream, _parse_one(deserialize), name)
            return grpc.unary_stream_rpc_method_handler(stream, response_serializer=serialize)
        unary = self._wrap(_with_headers(handler.unary_unary), _parse_one(deserialize), name)
        return grpc.unary_unary_rpc_method_handler(unary, response_serializer=serialize)

    def _wrap(self, handler: Any, parse: Callable[[Any], Any], name: str) -> Method:
        async def wrapped(raw: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:
            with log_call(name, _trace_headers(context)) as outcome:
                request, outcome.peer = None, context.peer()
                try:
                    with calling_as(self._identify(context, name), context.peer()) as identity:
                        outcome.caller = identity.name
                        request = parse(raw)
                        response = await handler(request, context)
                    outcome.code = grpc.StatusCode.OK
                    return response
                except asyncio.CancelledError:  # the client receives no status
                    if context.time_remaining() == 0:
                        outcome.code = grpc.StatusCode.DEADLINE_EXCEEDED
                    raise
                except Exception as error:
                    code, status = to_status(error)
                    outcome.set_error(error, code)
                    log_error(error, outcome.code, _subject(request, context))
                    id_trailer = request_id.to_metadata(_id_of(request, context))
                    trailers = (*to_trailers(error, status), *id_trailer, *(context.trailing_metadata() or ()))
                    await context.abort(outcome.code, status.message, trailers)
                finally:
                    outcome.subject = _subject(request, context)

        return wrapped

    def _identify(self, context: "grpc.aio.ServicerContext[Any, Any]", method: str) -> Identity:
        """Return the identity of a caller that may call the method, and compress its responses if it asks."""
        if GZIP_REQUEST in (context.invocation_metadata() or ()):
            context.set_compression(grpc.Compression.Gzip)
        identity = identify(self._authenticator, context)
        identity.require(required_scope(method), method)
        return identity

    def _guard(
        self, handler: "grpc.RpcMethodHandler[Any, Any]", scope: Scope, action: str
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        """Return a handler of streams for callers with a scope only."""

        async def guarded(request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> AsyncIterator[Any]:
            try:
                identify(self._authenticator, context).require(scope, action)
            except ServiceError as error:
                code, status = to_status(error)
                await context.abort(code, status.message, to_trailers(error, status))
            async for response in stream(request, context):
                yield response

        stream: Any = handler.stream_stream or handler.unary_stream
        create: Any = (
            grpc.stream_stream_rpc_method_handler if handler.stream_stream else grpc.unary_stream_rpc_method_handler
        )
        guarded_handler: grpc.RpcMethodHandler[Any, Any] = create(
            guarded, request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer
        )
        return guarded_handler


def _with_headers(handler: Any) -> Method:
    """Send the request id before the response."""

    async def respond(request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:
        response = await handler(request, context)
        await request_id.send_headers(context, _id_of(request, context))
        return response

    return respond


def _trace_headers(context: "grpc.aio.ServicerContext[Any, Any]") -> dict[str, str]:
    return {key: str(value) for key, value in context.invocation_metadata() or () if key in TRACE_HEADERS}


def _id_of(request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> str:
    """Return the request id, by which the caller finds the call in the log; that of the metadata if it has none."""
    own: str = getattr(request, "request_id", "")
    return own or request_id.from_metadata(context)


def _subject(request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> str:
    return getattr(request, "name", "") or _id_of(request, context)


def _parse_one(deserialize: Deserializer) -> Callable[[bytes], Any]:
    def parse(raw: bytes) -> Any:
        try:
            return deserialize(raw)
        except DecodeError:
            description = "the request must be a valid message of this method, with all strings in UTF-8"
            raise InvalidRequestError([Violation("", description)]) from None

    return parse


def _parse_each(deserialize: Deserializer) -> Callable[[AsyncIterator[bytes]], AsyncIterator[Any]]:
    parse = _parse_one(deserialize)

    async def parse_each(raw: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        async for message in raw:
            yield parse(message)

    return parse_each
