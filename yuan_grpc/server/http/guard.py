"""Refusal of requests that a page of another site made a browser send, and of requests with ambiguous framing."""

import re
from collections.abc import Collection
from ipaddress import ip_address
from uuid import uuid4

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from yuan_grpc.server.http.errors import error_object

ANY = "*"
"""The entry of a list that allows every host or origin."""

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:@/\[\]]*)(:[0-9]*)?")


class Guard:
    """An application that refuses requests before another one handles them.

    Args:
        app: the application that handles all other requests.
        hosts: allowed names in `Host`, in addition to `localhost` and to addresses; `*` allows all.
        origins: allowed values of `Origin`; `*` allows all.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str], origins: Collection[str]) -> None:
        self._app = app
        self._hosts = {host.lower() for host in hosts}
        self._origins = {origin.lower() for origin in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if refusal := self._refusal(Headers(scope=scope), scope.get("http_version")):
            await refusal(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, headers: Headers, http_version: str | None) -> JSONResponse | None:
        if "transfer-encoding" in headers and ("content-length" in headers or http_version == "1.0"):
            rule = "`Transfer-Encoding` must not be given together with `Content-Length`, or in HTTP/1.0"
            return _response(400, rule, "invalid_request")
        if not self._allows_host(headers.get("host", "localhost")):
            rule = f"`Host` must be localhost, an address or one of --http-allowed-hosts, not {headers['host']:.256}"
            return _response(403, rule, "host_not_allowed")
        if (origin := headers.get("origin")) is not None and not self._allows_origin(origin):
            rule = f"`Origin` must be absent or one of --http-allowed-origins, not {origin:.256}"
            return _response(403, rule, "origin_not_allowed")
        return None

    def _allows_host(self, header: str) -> bool:
        """Return whether a host is a known name, or an address.

        A site can point its own name to a local address (DNS rebinding), but a page from an address is from there.
        """
        if ANY in self._hosts:
            return True
        match = _HOST.fullmatch(header.lower())
        name = match[1].rstrip(".") if match else ""
        return name == "localhost" or name.endswith(".localhost") or name in self._hosts or _is_address(name)

    def _allows_origin(self, origin: str) -> bool:
        return ANY in self._origins or origin.lower() in self._origins


def _is_address(name: str) -> bool:
    try:
        ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _response(status: int, message: str, code: str) -> JSONResponse:
    """Return the refusal. The connection closes, since its next bytes may be a body that nobody reads."""
    request_id = uuid4().hex
    headers = {"x-request-id": request_id, "connection": "close"}
    return JSONResponse(error_object(status, message, code, request_id), status, headers)
