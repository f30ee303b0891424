"""The standard gRPC health service: SERVING from the end of the engine's warm-up until the server stops."""

from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

NAME: str = health.SERVICE_NAME


_pb: Any = health_pb2  # its published stubs are older than `List`


class _Servicer(health.aio.HealthServicer):
    """grpcio's servicer, with the method that it lacks."""

    _server_status: dict[str, int]

    async def List(self, request: Any, context: Any) -> Any:
        """Return the status of every service."""
        statuses = {name: _pb.HealthCheckResponse(status=status) for name, status in self._server_status.items()}
        return _pb.HealthListResponse(statuses=statuses)


class Health:
    """Health of the whole server (the empty name) and of each named service, always with the same status."""

    def __init__(self, *services: str) -> None:
        self._servicer = _Servicer()
        self._services = ("", *services)

    async def attach(self, server: grpc.aio.Server) -> None:
        """Register the service on a server that has not started yet, with the status NOT_SERVING."""
        await self._set_all(health_pb2.HealthCheckResponse.NOT_SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def set_serving(self) -> None:
        """Report SERVING: the engine has completed its warm-up."""
        await self._set_all(health_pb2.HealthCheckResponse.SERVING)

    async def set_stopping(self) -> None:
        """Report NOT_SERVING for good: the engine is lost, or the server is about to stop."""
        await self._servicer.enter_graceful_shutdown()

    async def _set_all(self, status: int) -> None:
        for service in self._services:
            await self._servicer.set(service, status)
