"""The standard gRPC health service: of the whole server, of its services, and of the three probes of Kubernetes."""

from collections.abc import Callable, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

NAME: str = health.SERVICE_NAME

STARTUP, READINESS, LIVENESS = "startup", "readiness", "liveness"
"""Names for probes: whether the engine has become ready once, accepts calls now, and is not stalled."""

_SERVING, _NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING

_pb: Any = health_pb2  # its published stubs are older than `List`


class _Servicer(health.aio.HealthServicer):
    """grpcio's servicer, with the method that it lacks."""

    _server_status: dict[str, int]

    async def List(self, request: Any, context: Any) -> Any:
        """Return the status of every service."""
        statuses = {name: _pb.HealthCheckResponse(status=status) for name, status in self._server_status.items()}
        return _pb.HealthListResponse(statuses=statuses)


class Health:
    """Health of the server. The empty name, `readiness` and the named services always have the same status.

    Args:
        services: names of the services.
        on_change: called with whether the server is ready, each time that it may have changed.
    """

    def __init__(self, *services: str, on_change: Callable[[bool], None] = lambda is_ready: None) -> None:
        self._servicer = _Servicer()
        self._ready_names = ("", *services, READINESS)
        self._on_change = on_change
        self._is_stopping = False

    async def attach(self, server: grpc.aio.Server) -> None:
        """Register the service on a server that has not started yet. It is alive, but not ready."""
        await self._set(_SERVING, [LIVENESS])
        await self._set(_NOT_SERVING, [STARTUP])
        await self._set_ready(False)
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def set_serving(self) -> None:
        """Report SERVING: the engine has completed its warm-up, or makes progress again."""
        await self._set(_SERVING, [STARTUP, LIVENESS])
        await self._set_ready(not self._is_stopping)

    async def set_stalled(self) -> None:
        """Report NOT_SERVING, also as liveness: the engine makes no progress."""
        await self._set(_NOT_SERVING, [LIVENESS])
        await self._set_ready(False)

    async def set_stopping(self) -> None:
        """Report NOT_SERVING for good: the engine is lost, or the server is about to stop. Liveness does not change."""
        self._is_stopping = True
        await self._set_ready(False)

    async def _set_ready(self, is_ready: bool) -> None:
        await self._set(_SERVING if is_ready else _NOT_SERVING, self._ready_names)
        self._on_change(is_ready)

    async def _set(self, status: int, names: Sequence[str]) -> None:
        for name in names:
            await self._servicer.set(name, status)
