"""Stubs whose published types lack their methods."""

from typing import Any

from grpc_health.v1 import health_pb2_grpc


def health_stub(channel: Any) -> Any:
    """A client of the standard health service."""
    return health_pb2_grpc.HealthStub(channel)
