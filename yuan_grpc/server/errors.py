"""The one table from exceptions to gRPC statuses, and the interceptor that applies it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
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
    """The engine's queue is full."""

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


Handler = Callable[[Any, Any], Any]


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
        codec = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(_guarded(handler.unary_stream), **codec)
        assert handler.unary_unary is not None
        return grpc.unary_unary_rpc_method_handler(_guarded(handler.unary_unary), **codec)


def _guarded(handler: Handler) -> Handler:
    async def guarded(request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:
        try:
            return await handler(request, context)
        except asyncio.CancelledError:
            raise  # the caller is gone: there is nobody to tell
        except Exception as error:
            code, status = status_of(error)
            if code is grpc.StatusCode.INTERNAL:
                logger.exception("request %r failed", request.request_id)
            elif error.__cause__:
                logger.warning("request %r: %s: %r", request.request_id, error, error.__cause__)
            await context.abort(code, status.message, (("grpc-status-details-bin", status.SerializeToString()),))

    return guarded
