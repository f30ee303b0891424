"""The authentication of HTTP requests."""

from uuid import uuid4

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from yuan_grpc.server.core.access_log import log_call
from yuan_grpc.server.errors import ServiceError
from yuan_grpc.server.http.connection import CERTIFICATE_NAMES
from yuan_grpc.server.http.errors import error_response
from yuan_grpc.server.security.authentication import Authenticator
from yuan_grpc.server.security.identity import Identity, calling_as
from yuan_grpc.server.security.identity import Scope as Permission

OPEN_PATHS = ("/health", "/ping")
"""Paths that need no identity: probes have none."""
ADMIN_PATHS = ("/metrics",)
"""Paths that need the scope `admin`."""


class Authentication:
    """An application that refuses callers that may not do what they ask for, and identifies the others.

    Args:
        app: the application that handles all other requests.
        authenticator: identifies callers.
    """

    def __init__(self, app: ASGIApp, authenticator: Authenticator) -> None:
        self._app = app
        self._authenticator = authenticator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("path") in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        try:
            identity = self._identify(scope)
        except ServiceError as error:
            with log_call(f"{scope.get('method', '')} {scope.get('path', ''):.256}") as outcome:
                outcome.set_error(error, error.code)
                await _refusal(error)(scope, receive, send)
            return
        with calling_as(identity, peer_of(scope)):
            await self._app(scope, receive, send)

    def _identify(self, scope: Scope) -> Identity:
        path = scope.get("path", "")
        values = Headers(scope=scope).getlist("authorization")
        names = scope.get("state", {}).get(CERTIFICATE_NAMES, [])
        identity = self._authenticator.identify(" ".join(values) or None, names)
        identity.require(Permission.ADMIN if path in ADMIN_PATHS else Permission.GENERATE, path[:256])
        return identity


def peer_of(scope: Scope) -> str:
    """Return the address of the caller."""
    host, port = scope.get("client") or ("", 0)
    return f"http:[{host}]:{port}" if ":" in host else f"http:{host}:{port}"


def _refusal(error: ServiceError) -> JSONResponse:
    """Return the response. The connection closes, since its next bytes may be a body that is not read."""
    request_id = uuid4().hex
    status, body, headers = error_response(error, request_id)
    challenge = {"www-authenticate": "Bearer"} if status == 401 else {}
    common = {"x-request-id": request_id, "connection": "close"}
    return JSONResponse(body, status, headers | challenge | common)
