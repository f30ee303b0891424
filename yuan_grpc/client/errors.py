"""Client exceptions: one class per kind of failure, with fields for programs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from yuan_grpc.client.google_rpc import BadRequest, ErrorInfo, RetryInfo
from yuan_grpc.v1 import yuan_pb2 as pb

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_RETRY_AFTER_SECONDS = 3600.0
"""Maximum of `retry_after`, in seconds, so that a broken server cannot make a program wait for years."""

_MILLISECONDS = re.compile(r"[0-9]{1,10}")


@dataclass(frozen=True)
class Violation:
    """An invalid field, and a sentence that names the field, the rule and the value."""

    field: str
    description: str


class YuanError(Exception):
    """A failed call. `__cause__` is the gRPC error, if there is one.

    Attributes:
        code: the gRPC status code.
        message: a human-readable message.
        reason: the name of an `ErrorReason` of `yuan.v1`, such as `OVERLOADED`; empty if gRPC itself failed the call.
        violations: all invalid fields of the request, with INVALID_ARGUMENT.
        retry_after: the delay before a retry that the server suggests, in seconds, at most an hour; None if it suggests
            none.
        request_id: the request id set by the caller or received from the server; empty otherwise.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        reason: str = "",
        violations: Iterable[Violation] = (),
        retry_after: float | None = None,
        request_id: str = "",
    ) -> None:
        self.code = code
        self.message = message
        self.reason = reason
        self.violations = tuple(violations)
        self.retry_after = retry_after
        self.request_id = request_id
        # All arguments, so that copies and pickles keep every field.
        super().__init__(code, message, reason, self.violations, retry_after, request_id)

    def __str__(self) -> str:
        return self.message or self.code.name

    def with_request_id(self, request_id: str) -> Self:
        """Return the same error with a request id."""
        copy = type(self)(self.code, self.message, self.reason, self.violations, self.retry_after, request_id)
        copy.__cause__ = self.__cause__
        return copy


class InvalidRequestError(YuanError):
    """INVALID_ARGUMENT: the request is invalid; `violations` lists the fields."""


class NotFoundError(YuanError):
    """NOT_FOUND: no such model, adapter or running call."""


class AlreadyExistsError(YuanError):
    """ALREADY_EXISTS: a call with this `request_id` is running, or the adapter is already loaded."""


class FailedPreconditionError(YuanError):
    """FAILED_PRECONDITION: the server was started without an option that the request needs."""


class ResourceExhaustedError(YuanError):
    """RESOURCE_EXHAUSTED: the request queue is full (see `retry_after`), or a message is too large."""


class CancelledCallError(YuanError):
    """CANCELLED: the call was aborted, or its client was closed."""


class DeadlineError(YuanError, TimeoutError):
    """DEADLINE_EXCEEDED: the call did not finish within its timeout."""


class UnavailableError(YuanError):
    """UNAVAILABLE: the server is unreachable, loading, stopping, or has lost its engine."""


class UnauthenticatedError(YuanError):
    """UNAUTHENTICATED: the token is missing or invalid."""


class PermissionDeniedError(YuanError):
    """PERMISSION_DENIED: the authenticated caller lacks the permission."""


class InternalError(YuanError):
    """INTERNAL, UNKNOWN or DATA_LOSS: the server failed; its log has the details. Or its response is incomplete."""


_CLASSES: dict[grpc.StatusCode, type[YuanError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExistsError,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    grpc.StatusCode.CANCELLED: CancelledCallError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.INTERNAL: InternalError,
    grpc.StatusCode.UNKNOWN: InternalError,
    grpc.StatusCode.DATA_LOSS: InternalError,
}


def error_from_code(code: grpc.StatusCode, message: str, **fields: Any) -> YuanError:
    """Return the exception for a status code."""
    return _CLASSES.get(code, YuanError)(code, message, **fields)


def error_from_rpc(error: Any, request_id: str = "") -> YuanError:
    """Convert a `grpc.RpcError` of a sync or async call. The caller's request id precedes that of the server."""
    # Not `dict(...)`: the metadata class of older grpcio looks like a mapping to `dict`, which then fails.
    trailers = {key: value for key, value in error.trailing_metadata() or ()}
    fields = _details(trailers.get("grpc-status-details-bin", b""))
    request_id = request_id or _text(trailers.get("x-request-id", ""))
    pushback = _text(trailers.get("grpc-retry-pushback-ms", ""))
    if "retry_after" not in fields and _MILLISECONDS.fullmatch(pushback):
        fields["retry_after"] = min(int(pushback) / 1000, MAX_RETRY_AFTER_SECONDS)
    return error_from_code(error.code(), error.details() or "", request_id=request_id, **fields)


def broken_response_error(problem: str, request_id: str) -> InternalError:
    """Return the error for a successful call whose response violates the contract."""
    return InternalError(grpc.StatusCode.INTERNAL, f"the server's response {problem}", request_id=request_id)


def unencodable_value_error(field: str, problem: ValueError) -> InvalidRequestError:
    """Return the error for a value that no message can encode; it is raised before anything is sent."""
    sentence = f"`{field}` cannot be encoded: {problem}"
    return InvalidRequestError(
        grpc.StatusCode.INVALID_ARGUMENT,
        sentence,
        "INVALID_REQUEST",
        violations=[Violation(field, sentence)],
    )


@contextmanager
def translate_errors(request_id: str = "") -> Iterator[None]:
    """Re-raise any `grpc.RpcError` of the block as a `YuanError`."""
    try:
        yield
    except grpc.RpcError as error:
        raise error_from_rpc(error, request_id) from error


def _details(raw: bytes) -> dict[str, Any]:
    """Return the fields found in `google.rpc` details, without those that are missing or malformed."""
    fields: dict[str, Any] = {}
    with suppress(DecodeError):
        # yuan.v1.Status has the same wire format as google.rpc.Status.
        for detail in pb.Status.FromString(raw).details:
            with suppress(DecodeError):
                _unpack(detail, fields)
    return fields


def _unpack(detail: Any, fields: dict[str, Any]) -> None:
    info, bad_request, retry = ErrorInfo(), BadRequest(), RetryInfo()
    if detail.Unpack(info):
        fields["reason"] = info.reason
    elif detail.Unpack(bad_request):
        fields["violations"] = tuple(Violation(v.field, v.description) for v in bad_request.field_violations)
    elif detail.Unpack(retry):
        seconds = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
        if seconds >= 0:
            fields["retry_after"] = min(seconds, MAX_RETRY_AFTER_SECONDS)


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
