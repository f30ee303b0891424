"""channelz on its port: the calls and connections of the server in the same process."""

import socket
from typing import Any

import grpc
import pytest
from fake_engine import FakeEngine, last
from servers import serve_grpc

from yuan_grpc.server.grpc import channelz
from yuan_grpc.server.start_error import StartError
from yuan_grpc.v1 import yuan_pb2 as pb
from yuan_grpc.v1 import yuan_pb2_grpc

proto = pytest.importorskip("grpc_channelz.v1.channelz_pb2", reason="needs channelz: pip install grpcio-channelz")
stubs = pytest.importorskip("grpc_channelz.v1.channelz_pb2_grpc")


async def list_servers(port: int) -> list[Any]:
    """Return the servers that channelz lists."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        response = await stubs.ChannelzStub(channel).GetServers(proto.GetServersRequest())
        return list(response.server)


async def test_channelz_counts_the_calls_of_the_server() -> None:
    async with channelz.serve(0) as port, serve_grpc(FakeEngine(last())) as address:
        async with grpc.aio.insecure_channel(address) as channel:
            stub: Any = yuan_pb2_grpc.YuanServiceStub(channel)
            for _ in range(3):
                await stub.Generate(pb.GenerateRequest(prompt="AB"))
        servers = await list_servers(port)
    calls = [(server.data.calls_started, server.data.calls_succeeded) for server in servers]
    assert (3, 3) in calls


async def test_channelz_is_disabled_by_default() -> None:
    async with channelz.serve(None) as port:
        assert port == 0


async def test_a_port_in_use_is_reported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(StartError, match=f"127.0.0.1:{port}: choose another with --channelz-port"):
            async with channelz.serve(port):
                pass
