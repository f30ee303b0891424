"""The standard health service, true: SERVING only between the engine's warm-up and the server's end."""

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

NAME: str = health.SERVICE_NAME


class Health:
    """Reports on the server as a whole ("") and on each of its services by name, all alike."""

    def __init__(self, *services: str) -> None:
        self._servicer = health.aio.HealthServicer()
        self._services = ("", *services)

    async def attach(self, server: grpc.aio.Server) -> None:
        """Adds the service to a server that has not started yet; it starts with NOT_SERVING."""
        await self._set_all(health_pb2.HealthCheckResponse.NOT_SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def serving(self) -> None:
        """The engine has answered."""
        await self._set_all(health_pb2.HealthCheckResponse.SERVING)

    async def stopping(self) -> None:
        """The engine is lost, or the server is about to stop. There is no way back."""
        await self._servicer.enter_graceful_shutdown()

    async def _set_all(self, status: int) -> None:
        for service in self._services:
            await self._servicer.set(service, status)
