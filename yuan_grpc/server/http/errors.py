"""The one table from exceptions to HTTP statuses, and the object that tells of them."""

from collections.abc import Mapping
from typing import Any

from grpc import StatusCode

from yuan_grpc.server.errors import INTERNAL_MESSAGE, InvalidRequestError, ServiceError, UnavailableError, Violation
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
"""What is not here is 500."""

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 499: "cancelled"}
"""OpenAI's names; other errors of the caller's are `invalid_request_error`, of the server's `server_error`."""

RETRY_SECONDS = 1
"""When to try again, where the error itself does not say."""


class TooLargeError(InvalidRequestError):
    """The body is larger than any that is read."""

    def __init__(self, most: int) -> None:
        super().__init__([Violation("", f"the body must be at most {most} bytes long")])


class StoppingError(UnavailableError):
    """The server takes no more calls, or ends those that outlast its patience."""

    def __init__(self) -> None:
        super().__init__("the server is stopping")


def error_response(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """What a caller is told: the status, the object and headers. What is no `ServiceError` says nothing of itself."""
    told = error if isinstance(error, ServiceError) else ServiceError(INTERNAL_MESSAGE)
    status = 413 if isinstance(told, TooLargeError) else _STATUSES.get(told.code, 500)
    reason = pb.ErrorReason.Name(told.reason).removeprefix("ERROR_REASON_").lower()
    violations = told.violations if isinstance(told, InvalidRequestError) else ()
    field = next((violation.field for violation in violations if violation.field), None)
    if reason == "model_not_found":
        field = "model"
    headers = {"retry-after": str(told.retry_seconds or RETRY_SECONDS)} if status in (429, 503) else {}
    return status, error_body(status, str(told), reason, field), headers


def error_body(status: int, message: str, code: str, field: str | None = None) -> dict[str, Any]:
    """OpenAI's object for an error."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


def renamed(error: InvalidRequestError, names: Mapping[str, str]) -> InvalidRequestError:
    """The same complaint in the caller's names for fields, where those differ from ours."""
    told = error.violations
    for ours, theirs in names.items():
        told = [
            Violation(theirs + v.field.removeprefix(ours), v.description.replace(f"`{ours}", f"`{theirs}"))
            if v.field.startswith(ours)
            else v
            for v in told
        ]
    return InvalidRequestError(told)
