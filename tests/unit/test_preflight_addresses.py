"""The check of the addresses before a start."""

import socket
from dataclasses import replace

import pytest
from ports import free_ports

from yuan_grpc.preflight import addresses
from yuan_grpc.server.settings import Settings
from yuan_grpc.server.start_error import StartError

SETTINGS = Settings(model="m", host="127.0.0.1", port=0, grace_seconds=0, engine_flags=(), frontends=3)


def test_free_ports_pass() -> None:
    addresses.check(replace(SETTINGS, frontend_ports=free_ports(3)))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("number", range(3))
def test_a_front_ends_port_in_use_is_named(number: int, shared: bool) -> None:
    first = free_ports(3)
    with (
        socket.create_server(("127.0.0.1", first + number), reuse_port=shared),
        pytest.raises(StartError, match=f"port {first + number} is in use: .* another one with --frontend-ports"),
    ):
        addresses.check(replace(SETTINGS, frontend_ports=first))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"port": 50052, "frontend_ports": 50051}, "--port and --frontend-ports must differ, and both are 50052"),
        ({"port": 50052, "http_port": 50052}, "--port and --http-port must differ, and both are 50052"),
        ({"frontends": 1, "frontend_ports": 50051}, "--frontend-ports needs several front ends"),
        ({"frontend_ports": 65534}, "--frontend-ports must be at most 65533 for 3 front ends, not 65534"),
    ],
)
def test_ports_that_cannot_be_used_together_are_named(changes: dict[str, int], message: str) -> None:
    with pytest.raises(StartError, match=message):
        addresses.check(replace(SETTINGS, **changes))  # type: ignore[arg-type]
