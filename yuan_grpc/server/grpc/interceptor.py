"""A server interceptor that parses requests, maps exceptions to statuses, and writes the access log."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from yuan_grpc.server.core.access_log import log_call, log_error
from yuan_grpc.server.core.limits import MAX_REQUEST_ID
from yuan_grpc.server.errors import InvalidRequestError, Violation, to_status, to_trailers

Method = Callable[[Any, Any], Awaitable[Any]]
Deserializer = Callable[[bytes], Any]


class StatusInterceptor(grpc.aio.ServerInterceptor):
    """An interceptor that turns handlers' exceptions into statuses. Handlers never abort a call themselves."""

    def __init__(self, *services: str) -> None:
        self._prefixes = tuple(f"/{service}/" for service in services)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Wrap the handlers of our services; return those of health and reflection unchanged."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(self._prefixes):
            return handler
        # Parse messages inside the wrapper: grpcio reports one it cannot parse as UNKNOWN, with a traceback.
        deserialize, serialize = handler.request_deserializer, handler.response_serializer
        name = method.rpartition("/")[2]
        assert deserialize is not None
        if handler.stream_stream:
            batch = _wrap(handler.stream_stream, _parse_each(deserialize), name)
            return grpc.stream_stream_rpc_method_handler(batch, response_serializer=serialize)
        if handler.unary_stream:
            stream = _wrap(handler.unary_stream, _parse_one(deserialize), name)
            return grpc.unary_stream_rpc_method_handler(stream, response_serializer=serialize)
        unary = _wrap(handler.unary_unary, _parse_one(deserialize), name)
        return grpc.unary_unary_rpc_method_handler(unary, response_serializer=serialize)


def _wrap(handler: Any, parse: Callable[[Any], Any], name: str) -> Method:
    async def wrapped(raw: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:
        with log_call(name) as outcome:
            request = None
            try:
                request = parse(raw)
                response = await handler(request, context)
                outcome.code = grpc.StatusCode.OK
                return response
            except asyncio.CancelledError:
                raise  # the client has cancelled or disconnected and receives no status
            except Exception as error:
                code, status = to_status(error)
                outcome.set_error(error, code)
                log_error(error, outcome.code, _subject(request))
                trailers = (
                    *to_trailers(error, status),
                    *_request_id_trailer(request),
                    *(context.trailing_metadata() or ()),
                )
                await context.abort(outcome.code, status.message, trailers)
            finally:
                outcome.subject, outcome.peer = _subject(request), context.peer()

    return wrapped


def _subject(request: Any) -> str:
    name: str = getattr(request, "request_id", "") or getattr(request, "name", "")
    return name


def _request_id_trailer(request: Any) -> tuple[tuple[str, str], ...]:
    """Return the trailer with the request id, by which the caller finds the call in the log; none if it has no id."""
    request_id: str = getattr(request, "request_id", "")
    can_be_header = request_id.isascii() and request_id.isprintable() and len(request_id) <= MAX_REQUEST_ID
    return (("x-request-id", request_id),) if request_id and can_be_header else ()


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
