"""The ports of several front ends."""

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from yuan_grpc.server.frontends.ports import Ports
from yuan_grpc.server.settings import Settings
from yuan_grpc.server.settings.grpc_port import GrpcSettings
from yuan_grpc.server.settings.mesh import MeshSettings
from yuan_grpc.server.start_error import StartError

SETTINGS = Settings(model="m", host="127.0.0.1", port=0, grace_seconds=0, engine_flags=(), http_port=0)


def test_ports_of_0_are_the_same_for_all_front_ends_and_can_be_shared() -> None:
    with Ports(SETTINGS, 2) as ports:
        assert ports.settings.port != ports.settings.http_port
        for port in (ports.settings.port, ports.settings.http_port):
            assert port
            for _ in range(2):
                with socket.create_server(("127.0.0.1", port), reuse_port=True):
                    pass


def test_each_front_end_has_its_own_port_socket_and_channelz() -> None:
    with Ports(SETTINGS, 1) as free:
        first = free.settings.port
    own = replace(SETTINGS, frontend_ports=first, grpc=GrpcSettings(unix_socket=Path("/run/yuan.sock")))
    with Ports(replace(own, mesh=MeshSettings(channelz_port=9000)), 1) as ports:
        assert ports.own_address(0) == f"127.0.0.1:{first}"
        assert ports.settings_for(0).grpc.unix_socket == Path("/run/yuan.sock")
        assert ports.settings_for(1).grpc.unix_socket == Path("/run/yuan.sock.1")
        assert ports.settings_for(1).mesh.channelz_port == 9001


@pytest.mark.parametrize("shared", [False, True])
def test_a_port_in_use_stops_the_start(shared: bool) -> None:
    with socket.create_server(("127.0.0.1", 0), reuse_port=shared) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(StartError, match=rf"cannot listen on 127\.0\.0\.1:{port}: "),
            Ports(replace(SETTINGS, http_port=port), 2),
        ):
            pass


def test_a_port_that_another_server_has_reserved_stops_the_start() -> None:
    with (
        Ports(SETTINGS, 2) as other,
        pytest.raises(StartError, match=rf"cannot listen on 127\.0\.0\.1:{other.settings.port}: "),
        Ports(replace(SETTINGS, port=other.settings.port), 2),
    ):
        pass
