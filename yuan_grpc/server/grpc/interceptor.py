"""What stands between gRPC and every handler: it parses, tells errors, and logs."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from yuan_grpc.server.core.access_log import log_call, log_error
from yuan_grpc.server.errors import InvalidRequestError, Violation, status_of, trailers_of

Method = Callable[[Any, Any], Awaitable[Any]]
Read = Callable[[bytes], Any]


class StatusInterceptor(grpc.aio.ServerInterceptor):
    """Turns what a handler raises into a status. Handlers never abort a call themselves."""

    def __init__(self, service: str) -> None:
        self._prefix = f"/{service}/"

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Wraps the handlers of our own service; health and reflection keep theirs."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(self._prefix):
            return handler
        # Messages are parsed behind the guard, for grpcio answers one it cannot parse with UNKNOWN and a traceback.
        read, write, name = handler.request_deserializer, handler.response_serializer, method.removeprefix(self._prefix)
        assert read is not None
        if handler.stream_stream:
            batch = _guarded(handler.stream_stream, _each(read), name)
            return grpc.stream_stream_rpc_method_handler(batch, response_serializer=write)
        if handler.unary_stream:
            stream = _guarded(handler.unary_stream, _one(read), name)
            return grpc.unary_stream_rpc_method_handler(stream, response_serializer=write)
        unary = _guarded(handler.unary_unary, _one(read), name)
        return grpc.unary_unary_rpc_method_handler(unary, response_serializer=write)


def _guarded(handler: Any, read: Callable[[Any], Any], name: str) -> Method:
    async def guarded(raw: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:
        with log_call(name) as outcome:
            request = None
            try:
                request = read(raw)
                response = await handler(request, context)
                outcome.code = grpc.StatusCode.OK
                return response
            except asyncio.CancelledError:
                raise  # the caller is gone: there is nobody to tell
            except Exception as error:
                outcome.code, status = status_of(error)
                log_error(error, outcome.code, _subject(request))
                await context.abort(outcome.code, status.message, trailers_of(error, status))
            finally:
                outcome.subject = _subject(request)

    return guarded


def _subject(request: Any) -> str:
    name: str = getattr(request, "request_id", "") or getattr(request, "name", "")
    return name


def _one(read: Read) -> Callable[[bytes], Any]:
    def one(raw: bytes) -> Any:
        try:
            return read(raw)
        except DecodeError:
            sentence = "the request must be a message of this service's, with all strings in UTF-8"
            raise InvalidRequestError([Violation("", sentence)]) from None

    return one


def _each(read: Read) -> Callable[[AsyncIterator[bytes]], AsyncIterator[Any]]:
    parse = _one(read)

    async def each(raw: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        async for message in raw:
            yield parse(message)

    return each
