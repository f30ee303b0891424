"""The paths, and what stands between HTTP and every handler: it refuses, tells errors, and logs."""

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
from yuan_grpc.server.errors import ModelNotFoundError, ServiceError, to_status
from yuan_grpc.server.http import generate
from yuan_grpc.server.http.call import AppState, ClientDisconnectedError, HttpCall
from yuan_grpc.server.http.errors import StoppingError, error_body, error_response
from yuan_grpc.server.http.openai import chat, completions

Handler = Callable[[HttpCall], Awaitable[None]]


class _Guarded:
    """A handler as an ASGI application."""

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
                pass  # there is nobody to tell
            except Exception as error:
                outcome.code, _ = to_status(error)
                log_error(error, outcome.code, call.name)
                await call.fail(error)
            finally:
                outcome.subject = call.name


def create_app(state: AppState) -> Starlette:
    """All paths."""

    async def health(request: Request) -> Response:
        is_serving = not state.stopping and _is_ready(state)
        return Response(status_code=200 if is_serving else 503)

    async def metrics(request: Request) -> Response:
        return Response(generate_latest(REGISTRY), headers={"content-type": CONTENT_TYPE_LATEST})

    async def models(request: Request) -> Response:
        return _told(lambda: {"object": "list", "data": _models(state)})

    async def model(request: Request) -> Response:
        return _told(lambda: _model(state, request.path_params["name"]))

    posts = {
        "/generate": generate.answer,
        "/v1/completions": completions.answer,
        "/v1/chat/completions": chat.answer,
    }
    routes = [
        *(
            Route(path, _Guarded(state, f"POST {path}", handler), methods=["POST"], name=path)
            for path, handler in posts.items()
        ),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _refused})
    app.router.redirect_slashes = False
    return app


def _is_ready(state: AppState) -> bool:
    try:
        return state.service.engine.is_ready
    except ServiceError:
        return False


def _models(state: AppState) -> list[dict[str, Any]]:
    """The served model first, then the loaded adapters."""
    engine = state.service.engine
    info = engine.info
    shared = {"object": "model", "created": state.created, "owned_by": "yuan-grpc", "max_model_len": info.max_model_len}
    adapters = [{"id": name, **shared, "root": info.name, "parent": info.name} for name in engine.loras]
    return [{"id": info.name, **shared, "root": info.name, "parent": None}, *adapters]


def _model(state: AppState, name: str) -> dict[str, Any]:
    models = _models(state)
    parsed = models[0]["id"] if name in state.aliases else name
    for model in models:
        if model["id"] == parsed:
            return model
    raise ModelNotFoundError(f"the model must be {models[0]['id']} or a loaded LoRA adapter, not {name:.256}")


def _told(content: Callable[[], dict[str, Any]]) -> Response:
    try:
        return JSONResponse(content())
    except ServiceError as error:
        status, told, headers = error_response(error)
        return JSONResponse(told, status, headers)


async def _refused(request: Request, error: Exception) -> Response:
    """What Starlette refuses: a path that is none, or a method that a path does not have."""
    assert isinstance(error, HTTPException)
    code = error.detail.lower().replace(" ", "_")
    sentence = f"{request.method} {request.url.path:.256} is not served: {error.detail}"
    return JSONResponse(error_body(error.status_code, sentence, code), error.status_code, error.headers)
