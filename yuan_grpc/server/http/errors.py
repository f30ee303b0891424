"""The mapping of errors to HTTP statuses and OpenAI error objects."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from grpc import StatusCode

from yuan_grpc.server.errors import InvalidRequestError, UnavailableError, Violation, public_error
from yuan_grpc.v1 import yuan_pb2 as pb

_STATUSES = {
    StatusCode.INVALID_ARGUMENT: 400,
    StatusCode.FAILED_PRECONDITION: 400,
    StatusCode.UNAUTHENTICATED: 401,
    StatusCode.PERMISSION_DENIED: 403,
    StatusCode.NOT_FOUND: 404,
    StatusCode.ALREADY_EXISTS: 409,
    StatusCode.RESOURCE_EXHAUSTED: 429,
    StatusCode.CANCELLED: 499,
    StatusCode.UNAVAILABLE: 503,
    StatusCode.DEADLINE_EXCEEDED: 504,
}
"""HTTP statuses by gRPC status code of the service's errors; INTERNAL is 500."""

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 499: "cancelled"}
"""OpenAI's error types by HTTP status; other 4xx are `invalid_request_error`, 5xx are `server_error`."""

RETRY_SECONDS = 1
"""Default delay before a retry, in seconds, for errors without their own."""


class BodyError(InvalidRequestError):
    """A request body that is not read to its end."""

    status: int
    """The HTTP status."""

    def __init__(self, rule: str) -> None:
        super().__init__([Violation("", rule)])


class TooLargeError(BodyError):
    """The request body exceeds the size limit."""

    status = 413

    def __init__(self, limit: int) -> None:
        super().__init__(f"the body must be at most {limit} bytes long")


class UnsupportedEncodingError(BodyError):
    """The request body has an encoding that the server cannot decode."""

    status = 415

    def __init__(self, encoding: str) -> None:
        super().__init__(f"`Content-Encoding` must be absent, gzip or deflate, not {encoding:.64}")


class BadEncodingError(BodyError):
    """The request body is not what its encoding says."""

    status = 400

    def __init__(self, encoding: str) -> None:
        super().__init__(f"the body must be complete and encoded as `Content-Encoding` says: {encoding}")


class TooSlowError(BodyError):
    """The client takes too long to send the request body."""

    status = 408

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the body must arrive within {seconds:g} seconds, plus the time of a slow connection")


class StoppingError(UnavailableError):
    """The server rejects new calls, or ends those that exceed the grace period."""

    def __init__(self) -> None:
        super().__init__("the server is stopping")


def error_response(error: Exception, request_id: str) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Return the HTTP status, error object and headers that report an error of a request."""
    reported = public_error(error)
    status = reported.status if isinstance(reported, BodyError) else _STATUSES.get(reported.code, 500)
    reason = pb.ErrorReason.Name(reported.reason).removeprefix("ERROR_REASON_").lower()
    violations = reported.violations if isinstance(reported, InvalidRequestError) else ()
    field = next((violation.field for violation in violations if violation.field), None)
    if reason == "model_not_found":
        field = "model"
    headers = {"retry-after": str(reported.retry_seconds or RETRY_SECONDS)} if status in (429, 503) else {}
    return status, error_object(status, str(reported), reason, request_id, field), headers


def error_object(status: int, message: str, code: str, request_id: str, field: str | None = None) -> dict[str, Any]:
    """Return an error object in OpenAI's format, with the request's id."""
    error_type = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": error_type, "param": field, "code": code, "request_id": request_id}}


@contextmanager
def naming_fields(names: Mapping[str, str]) -> Iterator[None]:
    """Raise errors of the block with the field names that the client used; see `rename_fields`."""
    try:
        yield
    except InvalidRequestError as error:
        raise rename_fields(error, names) from error.__cause__


def rename_fields(error: InvalidRequestError, names: Mapping[str, str]) -> InvalidRequestError:
    """Return the error with the field names that the client used.

    Args:
        error: an error with the field names of `GenerateRequest`.
        names: the client's field names, by names in `GenerateRequest`, with those of their parts. The first one counts.
    """
    violations = [_rename(violation, names) for violation in error.violations]
    return InvalidRequestError(list(dict.fromkeys(violations)))  # several fields may have the same name for the client


def _rename(violation: Violation, names: Mapping[str, str]) -> Violation:
    for ours, theirs in names.items():
        if violation.field == ours or violation.field.startswith((f"{ours}.", f"{ours}[")):
            field = theirs + violation.field.removeprefix(ours)
            return Violation(field, violation.description.replace(f"`{ours}", f"`{theirs}"))
    return violation
