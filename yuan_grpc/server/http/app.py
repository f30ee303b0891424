"""The HTTP application: its routes, error handling and access log."""

from collections.abc import Awaitable, Callable
from typing import Any

from grpc import StatusCode
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from yuan_grpc.server.core.access_log import log_call, log_error
from yuan_grpc.server.engine.model_names import model_not_found, resolve_alias
from yuan_grpc.server.errors import ServiceError, to_status
from yuan_grpc.server.http import generate
from yuan_grpc.server.http.call import AppState, ClientDisconnectedError, HttpCall
from yuan_grpc.server.http.errors import StoppingError, error_object, error_response
from yuan_grpc.server.http.openai import chat, completions

Handler = Callable[[HttpCall], Awaitable[None]]


class _Endpoint:
    """A handler as an ASGI application that sends its errors and writes the access log."""

    def __init__(self, state: AppState, name: str, handler: Handler) -> None:
        self._state = state
        self._name = name
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = HttpCall(self._state, scope, receive, send)
        with log_call(self._name) as outcome:
            try:
                if self._state.stopping:
                    raise StoppingError
                await self._handler(call)
                outcome.code = StatusCode.OK
            except ClientDisconnectedError:
                pass  # no client is left to receive an error
            except Exception as error:
                outcome.code, _ = to_status(error)
                log_error(error, outcome.code, call.request_id)
                await call.send_error(error)
            finally:
                outcome.subject = call.request_id


def create_app(state: AppState) -> Starlette:
    """Return the application with all routes."""

    async def health(request: Request) -> Response:
        is_serving = not state.stopping and _is_ready(state)
        return Response(status_code=200 if is_serving else 503)

    async def metrics(request: Request) -> Response:
        return Response(generate_latest(REGISTRY), headers={"content-type": CONTENT_TYPE_LATEST})

    async def models(request: Request) -> Response:
        return _respond(lambda: {"object": "list", "data": _models(state)})

    async def model(request: Request) -> Response:
        return _respond(lambda: _model(state, request.path_params["name"]))

    handlers = {
        "/generate": generate.handle,
        "/v1/completions": completions.handle,
        "/v1/chat/completions": chat.handle,
    }
    routes = [
        *(
            Route(path, _Endpoint(state, f"POST {path}", handler), methods=["POST"], name=path)
            for path, handler in handlers.items()
        ),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _reject_route})
    app.router.redirect_slashes = False
    return app


def _is_ready(state: AppState) -> bool:
    try:
        return state.service.engine.is_ready
    except ServiceError:
        return False


def _models(state: AppState) -> list[dict[str, Any]]:
    """Return OpenAI model objects: the served model, then the loaded adapters."""
    engine = state.service.engine
    info = engine.info
    common = {"object": "model", "created": state.created, "owned_by": "yuan-grpc", "max_model_len": info.max_model_len}
    adapters = [{"id": name, **common, "root": info.name, "parent": info.name} for name in engine.loras]
    return [{"id": info.name, **common, "root": info.name, "parent": None}, *adapters]


def _model(state: AppState, name: str) -> dict[str, Any]:
    models = _models(state)
    served = models[0]["id"]
    resolved = resolve_alias(name, state.aliases, served)
    for model in models:
        if model["id"] == resolved:
            return model
    raise model_not_found(name, served)


def _respond(content: Callable[[], dict[str, Any]]) -> Response:
    try:
        return JSONResponse(content())
    except ServiceError as error:
        status, body, headers = error_response(error)
        return JSONResponse(body, status, headers)


async def _reject_route(request: Request, error: Exception) -> Response:
    """Respond to an unknown path, or to a method that the path does not support."""
    assert isinstance(error, HTTPException)
    code = error.detail.lower().replace(" ", "_")
    message = f"{request.method} {request.url.path:.256} is not served: {error.detail}"
    return JSONResponse(error_object(error.status_code, message, code), error.status_code, error.headers)
