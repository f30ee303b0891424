"""Reflection, as grpcurl and buf use it: both versions, and every symbol of the contract."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from fake_engine import FakeEngine
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection_pb2
from servers import serve_grpc

from yuan_grpc.server.settings.mesh import MeshSettings

proto: Any = reflection_pb2
VERSIONS = ("v1", "v1alpha")
FILE = "yuan/v1/yuan.proto"
OPTIONAL = ("xds.service.orca.v3.OpenRcaService", "vllm.grpc.engine.VllmEngine")


@pytest_asyncio.fixture
async def channel() -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a server."""
    async with serve_grpc(FakeEngine()) as address, grpc.aio.insecure_channel(address) as channel:
        yield channel


async def ask(channel: grpc.aio.Channel, version: str, **request: Any) -> Any:
    """Return the response of a version of reflection to one request."""
    call = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=proto.ServerReflectionRequest.SerializeToString,
        response_deserializer=proto.ServerReflectionResponse.FromString,
    )
    async for response in call(iter([proto.ServerReflectionRequest(**request)])):
        return response


def files(response: Any) -> dict[str, FileDescriptorProto]:
    """Return the files of a response by name."""
    found = map(FileDescriptorProto.FromString, response.file_descriptor_response.file_descriptor_proto)
    return {file.name: file for file in found}


@pytest.mark.parametrize("version", VERSIONS)
async def test_both_versions_list_all_services(channel: grpc.aio.Channel, version: str) -> None:
    response = await ask(channel, version, list_services="*")
    assert {service.name for service in response.list_services_response.service} == {
        "yuan.v1.YuanService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    }


@pytest.mark.parametrize("version", VERSIONS)
async def test_optional_services_are_listed_with_their_definitions(version: str) -> None:
    pytest.importorskip("smg_grpc_proto", reason="needs the messages: pip install smg-grpc-proto")
    settings = MeshSettings(load_reports=True, vllm_engine=True)
    async with (
        serve_grpc(FakeEngine(), mesh=settings) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        response = await ask(channel, version, list_services="*")
        names = {service.name for service in response.list_services_response.service}
        orca = files(await ask(channel, version, file_containing_symbol=OPTIONAL[0] + ".StreamCoreMetrics"))
        engine = files(await ask(channel, version, file_containing_symbol=OPTIONAL[1]))
    assert names > set(OPTIONAL)
    assert orca.keys() == {
        "xds/service/orca/v3/orca.proto",
        "xds/data/orca/v3/orca_load_report.proto",
        "google/protobuf/duration.proto",
    }
    assert engine.keys() == {"vllm_engine.proto", "common.proto"}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "symbol",
    [
        "yuan.v1.YuanService",
        "yuan.v1.YuanService.Generate",
        "yuan.v1.GenerateRequest",
        "yuan.v1.GenerateRequest.max_tokens",
        "yuan.v1.GenerateRequest.input",
        "yuan.v1.GenerateRequest.LogitBiasEntry",
        "yuan.v1.GenerateRequest.LogitBiasEntry.key",
        "yuan.v1.FinishReason",
        "yuan.v1.FINISH_REASON_STOP",
        "yuan.v1.FinishReason.FINISH_REASON_STOP",
    ],
)
async def test_every_kind_of_symbol_is_found_with_all_imports(
    channel: grpc.aio.Channel, version: str, symbol: str
) -> None:
    found = files(await ask(channel, version, file_containing_symbol=symbol))
    assert {FILE, *found[FILE].dependency} == found.keys()


@pytest.mark.parametrize("symbol", ["yuan.v1.YuanService.Nothing", "yuan.v1.Nothing", "Generate", ""])
async def test_an_unknown_symbol_is_not_found(channel: grpc.aio.Channel, symbol: str) -> None:
    response = await ask(channel, "v1", file_containing_symbol=symbol)
    assert response.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


@pytest.mark.parametrize("version", VERSIONS)
async def test_reflection_describes_itself(channel: grpc.aio.Channel, version: str) -> None:
    name = f"grpc.reflection.{version}.ServerReflection"
    by_symbol = files(await ask(channel, version, file_containing_symbol=f"{name}.ServerReflectionInfo"))
    [(filename, file)] = by_symbol.items()
    [method] = file.service[0].method
    assert method.input_type == f".grpc.reflection.{version}.ServerReflectionRequest"
    assert files(await ask(channel, version, file_by_filename=filename)) == by_symbol


async def test_the_contract_has_packages_for_other_languages(channel: grpc.aio.Channel) -> None:
    options = files(await ask(channel, "v1", file_by_filename=FILE))[FILE].options
    assert options.go_package == "yuan/v1;yuanv1"
    assert (options.java_package, options.java_multiple_files) == ("yuan.v1", True)
    assert options.csharp_namespace == "Yuan.V1"
