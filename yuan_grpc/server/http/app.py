"""The HTTP application: its routes, error handling and access log."""

from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any
from uuid import uuid4

from grpc import StatusCode
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from yuan_grpc import __version__
from yuan_grpc.server.core.access_log import log_call, log_error
from yuan_grpc.server.errors import ServiceError, to_status
from yuan_grpc.server.http import generate, tokenization
from yuan_grpc.server.http.authentication import Authentication, peer_of
from yuan_grpc.server.http.call import AppState, ClientDisconnectedError, HttpCall
from yuan_grpc.server.http.errors import StoppingError, error_object, error_response
from yuan_grpc.server.http.guard import Guard
from yuan_grpc.server.http.metrics import public_metrics
from yuan_grpc.server.http.models import find_model, list_models
from yuan_grpc.server.http.openai import chat, completions
from yuan_grpc.server.security.authentication import OPEN, Authenticator

Handler = Callable[[HttpCall], Awaitable[None]]

HANDLERS: Mapping[str, Handler] = {
    "/generate": generate.generate,
    "/tokenize": tokenization.tokenize,
    "/detokenize": tokenization.detokenize,
    "/v1/completions": completions.create_completion,
    "/v1/chat/completions": chat.create_chat_completion,
}
"""Handlers of POST by path."""

_DOCS = ("yuan-grpc serves these routes. docs/reference/http.md describes them.", "")
_EXPOSED_HEADERS = ("x-request-id", "retry-after")
"""Headers that pages may read."""


class _Endpoint:
    """A handler as an ASGI application that sends its errors and writes the access log."""

    def __init__(self, state: AppState, name: str, handler: Handler) -> None:
        self._state = state
        self._name = name
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = HttpCall(self._state, scope, receive, send)
        with log_call(self._name, call.trace_headers) as outcome:
            outcome.peer = peer_of(scope)
            try:
                if self._state.stopping:
                    raise StoppingError
                await self._handler(call)
                outcome.code = StatusCode.OK
            except ClientDisconnectedError:
                pass  # no client is left to receive an error
            except Exception as error:
                code, _ = to_status(error)
                outcome.set_error(error, code)
                log_error(error, outcome.code, call.request_id)
                await call.send_error(error)
            finally:
                outcome.subject = call.request_id


def create_app(
    state: AppState, hosts: Collection[str], origins: Collection[str], authenticator: Authenticator = OPEN
) -> Starlette:
    """Return the application with all routes.

    Args:
        hosts: allowed names in `Host`, in addition to `localhost` and to addresses; `*` allows all.
        origins: allowed values of `Origin`; `*` allows all.
        authenticator: identifies callers.
    """

    async def health(request: Request) -> Response:
        is_serving = not state.stopping and not state.service.is_withdrawing and _is_ready(state)
        return Response(status_code=200 if is_serving else 503)

    async def metrics(request: Request) -> Response:
        return Response(public_metrics(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def model(request: Request) -> Response:
        return _respond(lambda: find_model(state, request.path_params["name"]))

    def json_endpoint(content: Callable[[AppState], dict[str, Any]]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            return _respond(lambda: content(state))

        return endpoint

    routes = [
        *(
            Route(path, _Endpoint(state, f"POST {path}", handler), methods=["POST"], name=path)
            for path, handler in HANDLERS.items()
        ),
        Route("/health", health),
        Route("/ping", health, methods=["GET", "POST"]),  # SageMaker's name for it
        Route("/metrics", metrics),
        Route("/version", json_endpoint(lambda _: {"version": __version__})),
        Route("/tokenizer_info", json_endpoint(tokenization.describe_tokenizer)),
        Route("/v1/models", json_endpoint(list_models)),
        Route("/v1/models/{name:path}", model),
    ]
    paths = [f"{'|'.join(sorted(route.methods or ()))} {route.path}" for route in routes]
    routes.append(Route("/docs", lambda _: PlainTextResponse("\n".join([*_DOCS, *paths, ""]))))
    middleware = [Middleware(Guard, hosts, origins), Middleware(_WithoutSlash)]
    if origins:
        methods = ("GET", "POST")
        cors = Middleware(CORSMiddleware, origins, methods, allow_headers=["*"], expose_headers=_EXPOSED_HEADERS)
        middleware.append(cors)
    middleware.append(Middleware(Authentication, authenticator))  # after CORS: browsers ask without a token first
    app = Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: _reject_route})
    app.router.redirect_slashes = False
    return app


class _WithoutSlash:
    """An application that serves a path with a slash at its end like the one without it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        await self._app({**scope, "path": path.rstrip("/") or "/"} if path.endswith("/") else scope, receive, send)


def _is_ready(state: AppState) -> bool:
    try:
        return state.service.engine.is_ready
    except ServiceError:
        return False


def _respond(content: Callable[[], dict[str, Any]]) -> Response:
    try:
        return JSONResponse(content())
    except ServiceError as error:
        request_id = uuid4().hex
        status, body, headers = error_response(error, request_id)
        return JSONResponse(body, status, headers | {"x-request-id": request_id})


async def _reject_route(request: Request, error: Exception) -> Response:
    """Respond to an unknown path, or to a method that the path does not support."""
    assert isinstance(error, HTTPException)
    code = error.detail.lower().replace(" ", "_")
    message = f"{request.method} {request.url.path:.256} is not served: {error.detail}"
    request_id = uuid4().hex
    headers = {**(error.headers or {}), "x-request-id": request_id}
    return JSONResponse(error_object(error.status_code, message, code, request_id), error.status_code, headers)
