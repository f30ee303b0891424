"""The one table from exceptions to gRPC statuses, and the interceptor that applies it."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

logger = logging.getLogger(__name__)

DOMAIN = "yuan.v1"
INTERNAL_MESSAGE = "an internal error occurred; the server's log has more under this request's id"
RETRY_SECONDS = 1


@dataclass(frozen=True)
class Violation:
    """A field that is wrong, and a sentence that names field, rule and value."""

    field: str
    description: str


class ServiceError(Exception):
    """An error the caller is told about: its text is the status message."""

    code = grpc.StatusCode.INTERNAL
    reason = "INTERNAL"

    def details(self) -> Sequence[Message]:
        """`google.rpc` messages beside the `ErrorInfo` that every status has."""
        return ()


class InvalidRequestError(ServiceError):
    """The request cannot be served as it is, now or later."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_REQUEST"

    def __init__(self, violations: Sequence[Violation]) -> None:
        super().__init__("; ".join(violation.description for violation in violations))
        self.violations = violations

    def details(self) -> Sequence[Message]:
        """All violations, not the first alone."""
        violations = [BadRequest.FieldViolation(field=v.field, description=v.description) for v in self.violations]
        return (BadRequest(field_violations=violations),)


class DuplicateRequestError(ServiceError):
    """A call with the same id is still running."""

    code = grpc.StatusCode.ALREADY_EXISTS
    reason = "DUPLICATE_REQUEST_ID"


class OverloadedError(ServiceError):
    """The engine has as many requests as it may."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "OVERLOADED"

    def details(self) -> Sequence[Message]:
        """When to try again."""
        return (RetryInfo(retry_delay=Duration(seconds=RETRY_SECONDS)),)


class UnavailableError(ServiceError):
    """The engine is not there: not yet, no longer, or not for this request."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "ENGINE_UNAVAILABLE"


def status_of(error: Exception) -> tuple[grpc.StatusCode, Status]:
    """What a caller is told. What is not a `ServiceError` is internal, and says nothing of itself."""
    told = error if isinstance(error, ServiceError) else ServiceError(INTERNAL_MESSAGE)
    status = Status(code=told.code.value[0], message=str(told))
    for detail in (ErrorInfo(reason=told.reason, domain=DOMAIN), *told.details()):
        status.details.add().Pack(detail)
    return told.code, status


Handler = Callable[[bytes, Any], Any]


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
        if handler is None or not handler_call_details.method.startswith(self._prefix):
            return handler
        # Messages are parsed behind the guard, for grpcio answers one it cannot parse with UNKNOWN and a traceback.
        read, write = handler.request_deserializer, handler.response_serializer
        if handler.unary_stream:
            guarded = _guarded(handler.unary_stream, read)
            return grpc.unary_stream_rpc_method_handler(guarded, response_serializer=write)
        guarded = _guarded(handler.unary_unary, read)
        return grpc.unary_unary_rpc_method_handler(guarded, response_serializer=write)


def _guarded(handler: Any, read: Any) -> Handler:
    async def guarded(raw: bytes, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:
        began, request_id, outcome = time.monotonic(), "", grpc.StatusCode.CANCELLED
        try:
            request = _parsed(raw, read)
            request_id = request.request_id = request.request_id or uuid4().hex
            response = await handler(request, context)
            outcome = grpc.StatusCode.OK
            return response
        except asyncio.CancelledError:
            raise  # the caller is gone: there is nobody to tell
        except Exception as error:
            outcome, status = status_of(error)
            if outcome is grpc.StatusCode.INTERNAL:
                logger.exception("request %r failed", request_id)
            elif error.__cause__:
                logger.warning("request %r: %s: %r", request_id, error, error.__cause__)
            await context.abort(outcome, status.message, (("grpc-status-details-bin", status.SerializeToString()),))
        finally:
            logger.info("request %.256r: %s after %.3f s", request_id, outcome.name, time.monotonic() - began)

    return guarded


def _parsed(raw: bytes, read: Any) -> Any:
    try:
        return read(raw)
    except DecodeError:
        sentence = "the request must be a message of this service's, with all strings in UTF-8"
        raise InvalidRequestError([Violation("", sentence)]) from None
