"""The one table from exceptions to gRPC statuses."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import uniform

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from yuan_grpc.v1 import yuan_pb2 as pb

DOMAIN = "yuan.v1"
INTERNAL_MESSAGE = "an internal error occurred; the server's log has more under this request's id"
MAX_VIOLATIONS = 12
"""A status travels in headers, of which clients take 8 KB by default: so it has an end."""
MAX_DESCRIPTION = 160
MAX_MESSAGE = 600
"""Bytes, which take four in headers for three, and nine where a message is not in ASCII."""


@dataclass(frozen=True)
class Violation:
    """A field that is wrong, and a sentence that names field, rule and value."""

    field: str
    description: str


class ServiceError(Exception):
    """An error the caller is told about: its text is the status message."""

    code = grpc.StatusCode.INTERNAL
    reason = pb.ERROR_REASON_INTERNAL
    retry_seconds: int | None = None
    """When to try again; None where nothing is known of that."""

    def details(self) -> Sequence[Message]:
        """`google.rpc` messages beside the `ErrorInfo` that every status has."""
        return ()


class InvalidRequestError(ServiceError):
    """The request cannot be served as it is, now or later."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = pb.ERROR_REASON_INVALID_REQUEST

    def __init__(self, violations: Sequence[Violation]) -> None:
        told = violations[:MAX_VIOLATIONS]
        self.violations = [Violation(v.field, _cut(v.description, MAX_DESCRIPTION)) for v in told]
        super().__init__(_cut("; ".join(violation.description for violation in self.violations), MAX_MESSAGE))

    def details(self) -> Sequence[Message]:
        """All violations, not the first alone."""
        violations = [BadRequest.FieldViolation(field=v.field, description=v.description) for v in self.violations]
        return (BadRequest(field_violations=violations),)


class DuplicateRequestError(ServiceError):
    """A call with the same id is still running."""

    code = grpc.StatusCode.ALREADY_EXISTS
    reason = pb.ERROR_REASON_DUPLICATE_REQUEST_ID


class RequestNotFoundError(ServiceError):
    """No running call has this id."""

    code = grpc.StatusCode.NOT_FOUND
    reason = pb.ERROR_REASON_REQUEST_NOT_FOUND


class ModelNotFoundError(ServiceError):
    """Neither the served model nor an adapter has this name."""

    code = grpc.StatusCode.NOT_FOUND
    reason = pb.ERROR_REASON_MODEL_NOT_FOUND


class DuplicateLoraError(ServiceError):
    """A model or an adapter of this name is loaded."""

    code = grpc.StatusCode.ALREADY_EXISTS
    reason = pb.ERROR_REASON_DUPLICATE_LORA


class NotEnabledError(ServiceError):
    """The server was not started with what the request needs."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = pb.ERROR_REASON_NOT_ENABLED


class AbortedError(ServiceError):
    """Abort has ended the call."""

    code = grpc.StatusCode.CANCELLED
    reason = pb.ERROR_REASON_ABORTED


class OverloadedError(ServiceError):
    """The engine has as many requests as it may."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = pb.ERROR_REASON_OVERLOADED
    retry_seconds = 1

    def details(self) -> Sequence[Message]:
        """When to try again."""
        return (RetryInfo(retry_delay=Duration(seconds=self.retry_seconds)),)


class AnswerTooLargeError(ServiceError):
    """What was generated does not fit into a message."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = pb.ERROR_REASON_ANSWER_TOO_LARGE


class UnavailableError(ServiceError):
    """The engine is not there: not yet, no longer, or not for this request."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = pb.ERROR_REASON_ENGINE_UNAVAILABLE


def status_of(error: Exception) -> tuple[grpc.StatusCode, Status]:
    """What a caller is told. What is not a `ServiceError` is internal, and says nothing of itself."""
    told = error if isinstance(error, ServiceError) else ServiceError(INTERNAL_MESSAGE)
    status = Status(code=told.code.value[0], message=str(told))
    reason = pb.ErrorReason.Name(told.reason).removeprefix("ERROR_REASON_")
    for detail in (ErrorInfo(reason=reason, domain=DOMAIN), *told.details()):
        status.details.add().Pack(detail)
    return told.code, status


def trailers_of(error: Exception, status: Status) -> tuple[tuple[str, str | bytes], ...]:
    """What travels with a status: its details, and for gRPC's own retries, when to make the next.

    Who was refused at the same time is not told the same time.
    """
    details = ("grpc-status-details-bin", status.SerializeToString())
    seconds = error.retry_seconds if isinstance(error, ServiceError) else None
    if seconds is None:
        return (details,)
    return details, ("grpc-retry-pushback-ms", str(round(uniform(1, 2) * seconds * 1000)))


def _cut(text: str, size: int) -> str:
    raw = text.encode()
    return text if len(raw) <= size else raw[: size - len("…".encode())].decode(errors="ignore") + "…"
