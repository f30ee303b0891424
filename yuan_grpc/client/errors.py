"""Errors of calls: one exception for each kind, with fields for programs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from yuan_grpc.client.google_rpc import BadRequest, ErrorInfo, RetryInfo
from yuan_grpc.v1 import yuan_pb2 as pb


@dataclass(frozen=True)
class Violation:
    """A field that is wrong, and a sentence that names field, rule and value."""

    field: str
    description: str


class YuanError(Exception):
    """A call that did not end well. Its `__cause__` is gRPC's own error, where there is one.

    Attributes:
        code: the status.
        message: a sentence for people.
        reason: the name of an `ErrorReason` of `yuan.v1`, such as `OVERLOADED`; empty where gRPC itself answered.
        violations: with INVALID_ARGUMENT, all that is wrong with the request.
        retry_after: seconds after which the server suggests to try again; None where it says nothing of it.
        request_id: the request's name, where the caller gave one or the server had told it; empty otherwise.
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
        # All of them, so that a copy or a pickle has them too.
        super().__init__(code, message, reason, self.violations, retry_after, request_id)

    def __str__(self) -> str:
        return self.message or self.code.name


class InvalidRequestError(YuanError):
    """INVALID_ARGUMENT: the request cannot be served as it is; `violations` say why."""


class NotFoundError(YuanError):
    """NOT_FOUND: no such model, adapter or running call."""


class AlreadyExistsError(YuanError):
    """ALREADY_EXISTS: a call of this `request_id` is running, or an adapter of this name is loaded."""


class FailedPreconditionError(YuanError):
    """FAILED_PRECONDITION: the server was not started with what the request needs."""


class ResourceExhaustedError(YuanError):
    """RESOURCE_EXHAUSTED: the engine has as many requests as it may; see `retry_after`. Or a message is too large."""


class CancelledCallError(YuanError):
    """CANCELLED: Abort has ended the call, or its client was closed."""


class DeadlineError(YuanError, TimeoutError):
    """DEADLINE_EXCEEDED: the call's time was up."""


class UnavailableError(YuanError):
    """UNAVAILABLE: no server is there, it is loading or stopping, or has lost its engine."""


class UnauthenticatedError(YuanError):
    """UNAUTHENTICATED: the token is missing, or is not a good one."""


class PermissionDeniedError(YuanError):
    """PERMISSION_DENIED: the caller is known, and may not do this."""


class InternalError(YuanError):
    """INTERNAL, UNKNOWN or DATA_LOSS: an error of the server's own, of which its log has more."""


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


def error_with(code: grpc.StatusCode, message: str, **fields: Any) -> YuanError:
    """The error of a status: of the class that stands for its code."""
    return _CLASSES.get(code, YuanError)(code, message, **fields)


def error_of(error: Any, request_id: str = "") -> YuanError:
    """What gRPC raised as an error of ours; `error` is any `grpc.RpcError`, of a sync or an async call."""
    # Pair by pair: older grpcio has a kind of metadata that `dict` takes for a mapping, and fails.
    trailers = {key: value for key, value in error.trailing_metadata() or ()}
    fields = _details(trailers.get("grpc-status-details-bin", b""))
    pushback = _text(trailers.get("grpc-retry-pushback-ms", ""))
    if "retry_after" not in fields and pushback.isdecimal():
        fields["retry_after"] = int(pushback) / 1000
    return error_with(error.code(), error.details() or "", request_id=request_id, **fields)


def bad_value(field: str, problem: ValueError, request_id: str = "") -> InvalidRequestError:
    """The error of a value that no message can hold, which is found before anything is sent."""
    sentence = f"`{field}` has a value that cannot be sent: {problem}"
    return InvalidRequestError(
        grpc.StatusCode.INVALID_ARGUMENT,
        sentence,
        "INVALID_REQUEST",
        violations=[Violation(field, sentence)],
        request_id=request_id,
    )


@contextmanager
def translated(request_id: str = "") -> Iterator[None]:
    """Raises as `YuanError` what gRPC raises inside."""
    try:
        yield
    except grpc.RpcError as error:
        raise error_of(error, request_id) from error


def _details(raw: bytes) -> dict[str, Any]:
    """The fields that `google.rpc` details have; none where they are not there or cannot be read."""
    fields: dict[str, Any] = {}
    info, bad, retry = ErrorInfo(), BadRequest(), RetryInfo()
    try:
        # Field by field a google.rpc.Status.
        for detail in pb.Status.FromString(raw).details:
            if detail.Unpack(info):
                fields["reason"] = info.reason
            elif detail.Unpack(bad):
                fields["violations"] = tuple(Violation(v.field, v.description) for v in bad.field_violations)
            elif detail.Unpack(retry):
                fields["retry_after"] = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    except DecodeError:
        return {}
    return fields


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
