"""The exceptions of the service, with their gRPC statuses."""

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
INTERNAL_MESSAGE = "an internal error occurred; see the server's log for this request id"
PUSHBACK = "grpc-retry-pushback-ms"
MIN_PUSHBACK_SECONDS = 0.1
"""Minimum delay before a retry. On a delay of 0, grpcio 1.85 does not retry, and its call hangs until its deadline."""
MAX_VIOLATIONS = 12
"""Maximum violations in a status. Statuses travel in headers, and clients accept 8 KB of headers by default."""
MAX_DESCRIPTION = 160
"""Maximum size of a violation's description, in bytes."""
MAX_MESSAGE = 600
"""Maximum size of a status message, in bytes. Headers expand 3 bytes to 4 (base64), or to 9 if they are not ASCII."""


@dataclass(frozen=True)
class Violation:
    """An invalid field, and a sentence that names the field, the rule and the value."""

    field: str
    description: str


class ServiceError(Exception):
    """An error reported to the client, with its text as the status message."""

    code = grpc.StatusCode.INTERNAL
    reason = pb.ERROR_REASON_INTERNAL
    retry_seconds: int | None = None
    """Delay before a retry, in seconds; None if unknown."""

    def details(self) -> Sequence[Message]:
        """Return the `google.rpc` messages to send in addition to `ErrorInfo`, which every status has."""
        return () if self.retry_seconds is None else (RetryInfo(retry_delay=Duration(seconds=self.retry_seconds)),)


class InvalidRequestError(ServiceError):
    """A request that cannot be served, now or later."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = pb.ERROR_REASON_INVALID_REQUEST

    def __init__(self, violations: Sequence[Violation]) -> None:
        reported = violations[:MAX_VIOLATIONS]
        self.violations = [Violation(v.field, _shorten(v.description, MAX_DESCRIPTION)) for v in reported]
        super().__init__(_shorten("; ".join(violation.description for violation in self.violations), MAX_MESSAGE))

    def __reduce__(self) -> tuple[type["InvalidRequestError"], tuple[Sequence[Violation]]]:
        """Let the error be passed between processes."""
        return type(self), (self.violations,)

    def details(self) -> Sequence[Message]:
        """Return all violations, not only the first."""
        violations = [BadRequest.FieldViolation(field=v.field, description=v.description) for v in self.violations]
        return (BadRequest(field_violations=violations),)


class DuplicateRequestError(ServiceError):
    """A call with the same request id is running."""

    code = grpc.StatusCode.ALREADY_EXISTS
    reason = pb.ERROR_REASON_DUPLICATE_REQUEST_ID


class RequestNotFoundError(ServiceError):
    """No running call has this request id."""

    code = grpc.StatusCode.NOT_FOUND
    reason = pb.ERROR_REASON_REQUEST_NOT_FOUND


class ModelNotFoundError(ServiceError):
    """Neither the served model nor a loaded adapter has this name."""

    code = grpc.StatusCode.NOT_FOUND
    reason = pb.ERROR_REASON_MODEL_NOT_FOUND


class DuplicateLoraError(ServiceError):
    """A model or an adapter with this name is already loaded."""

    code = grpc.StatusCode.ALREADY_EXISTS
    reason = pb.ERROR_REASON_DUPLICATE_LORA


class NotEnabledError(ServiceError):
    """The request needs a feature that the server was started without."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = pb.ERROR_REASON_NOT_ENABLED


class UnauthenticatedError(ServiceError):
    """The caller has no valid token or certificate."""

    code = grpc.StatusCode.UNAUTHENTICATED
    reason = pb.ERROR_REASON_UNAUTHENTICATED


class PermissionDeniedError(ServiceError):
    """The caller is known, but lacks the permission."""

    code = grpc.StatusCode.PERMISSION_DENIED
    reason = pb.ERROR_REASON_PERMISSION_DENIED


class AbortedError(ServiceError):
    """The call was ended by Abort. CANCELLED, because ABORTED is for conflicts, after which clients may retry."""

    code = grpc.StatusCode.CANCELLED
    reason = pb.ERROR_REASON_ABORTED


class OverloadedError(ServiceError):
    """The request queue is full, or the caller's share of it."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = pb.ERROR_REASON_OVERLOADED
    retry_seconds = 1


class DeadlineTooShortError(ServiceError):
    """The request cannot finish before the caller's deadline."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = pb.ERROR_REASON_DEADLINE_TOO_SHORT


class AnswerTooLargeError(ServiceError):
    """The generated output does not fit into one message."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = pb.ERROR_REASON_ANSWER_TOO_LARGE


class UnavailableError(ServiceError):
    """The engine is not ready, was lost, or dropped the request."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = pb.ERROR_REASON_ENGINE_UNAVAILABLE


class ServerStoppingError(UnavailableError):
    """The server accepts no new calls, or ends those that exceed the grace period. Another server may serve them."""

    retry_seconds = 0

    def __init__(self) -> None:
        super().__init__("the server is stopping")


def public_error(error: Exception) -> ServiceError:
    """Return the error to report: a `ServiceError` itself, or an error without the text, which may contain secrets."""
    return error if isinstance(error, ServiceError) else ServiceError(INTERNAL_MESSAGE)


def reason_name(error: Exception) -> str:
    """Return the name of an error's reason, as in `ErrorInfo`."""
    return pb.ErrorReason.Name(public_error(error).reason).removeprefix("ERROR_REASON_")


def to_status(error: Exception) -> tuple[grpc.StatusCode, Status]:
    """Return the status code of an error, and the status with its details."""
    reported = public_error(error)
    status = Status(code=reported.code.value[0], message=str(reported))
    for detail in (ErrorInfo(reason=reason_name(error), domain=DOMAIN), *reported.details()):
        status.details.add().Pack(detail)
    return reported.code, status


def to_trailers(error: Exception, status: Status) -> tuple[tuple[str, str | bytes], ...]:
    """Return the trailing metadata of a status: its details and, for retries built into gRPC, the delay.

    The delay is random, so that clients rejected together do not retry together.
    """
    details = ("grpc-status-details-bin", status.SerializeToString())
    seconds = error.retry_seconds if isinstance(error, ServiceError) else None
    if seconds is not None:
        delay = max(seconds, MIN_PUSHBACK_SECONDS) + uniform(0, max(seconds, 1))
        return details, (PUSHBACK, str(round(delay * 1000)))
    if status.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]:
        return details, (PUSHBACK, "-1")  # forbids the retries that clients make with this status
    return (details,)


def _shorten(text: str, size: int) -> str:
    raw = text.encode()
    return text if len(raw) <= size else raw[: size - len("…".encode())].decode(errors="ignore") + "…"
