"""The standard reflection service, as `grpc.reflection.v1` and, for older clients, `v1alpha`."""

from collections.abc import Collection
from typing import Any

import grpc
from google.protobuf import text_format
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import Default, DescriptorPool
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection import SERVICE_NAME, aio

_pb: Any = reflection_pb2
_ALPHA = "grpc.reflection.v1alpha"
_STABLE = "grpc.reflection.v1"

NAMES = (SERVICE_NAME, SERVICE_NAME.replace(_ALPHA, _STABLE))
"""The names under which the service is served. Both versions have the same messages."""


def attach(server: grpc.aio.Server, services: Collection[str], pools: Collection[DescriptorPool] = ()) -> None:
    """Register the service on a server that has not started yet.

    Args:
        services: the names of the other services of the server.
        pools: pools with the definitions of services that the default pool does not have.
    """
    servicer = _Servicer((*services, *NAMES), pools)
    for name in NAMES:
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "ServerReflectionInfo": grpc.stream_stream_rpc_method_handler(
                servicer.ServerReflectionInfo,
                request_deserializer=_pb.ServerReflectionRequest.FromString,
                response_serializer=_pb.ServerReflectionResponse.SerializeToString,
            )
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
        server.add_registered_method_handlers(name, handlers)


class _Servicer(aio.ReflectionServicer):
    """grpcio's servicer, which also finds methods, fields and enum values, and its own definition as v1."""

    def __init__(self, services: Collection[str], pools: Collection[DescriptorPool]) -> None:
        super().__init__(services, _Files(pools))


class _Files:
    """The default descriptor pool, the file of `grpc.reflection.v1`, and other pools.

    The file is in a pool of its own: a later grpcio-reflection may add another one with the same messages to the
    default pool.
    """

    def __init__(self, pools: Collection[DescriptorPool]) -> None:
        self._pools = (Default(), _stable_pool(), *pools)
        self.FindMessageTypeByName = self._pools[0].FindMessageTypeByName
        self.FindExtensionByNumber = self._pools[0].FindExtensionByNumber
        self.FindAllExtensions = self._pools[0].FindAllExtensions

    def FindFileByName(self, name: str) -> Any:
        """Return a file; raise KeyError if it is unknown."""
        for pool in self._pools:
            try:
                return pool.FindFileByName(name)
            except KeyError:
                pass
        raise KeyError(name)

    def FindFileContainingSymbol(self, symbol: str) -> Any:
        """Return the file with a symbol; raise KeyError if it is unknown.

        A pool knows no methods and enum values, and depending on its implementation no fields: then the file of the
        service, message or enum is returned if that has a member of this name.
        """
        for pool in self._pools:
            for name in (symbol, symbol.rpartition(".")[0]):
                try:
                    file = pool.FindFileContainingSymbol(name)
                except KeyError:
                    continue
                if symbol in _symbols(file):
                    return file
        raise KeyError(symbol)


def _stable_pool() -> DescriptorPool:
    """Return a pool with the file of `grpc.reflection.v1`: the one of `v1alpha` with other names."""
    alpha, pool = FileDescriptorProto(), DescriptorPool()
    reflection_pb2.DESCRIPTOR.CopyToProto(alpha)
    stable = text_format.Parse(text_format.MessageToString(alpha).replace(_ALPHA, _STABLE), FileDescriptorProto())
    stable.name = "grpc/reflection/v1/reflection.proto"
    pool.AddSerializedFile(stable.SerializeToString())
    return pool


def _symbols(file: Any) -> set[str]:
    """Return the full names of everything that a file defines."""
    proto = FileDescriptorProto()
    file.CopyToProto(proto)
    prefix = f"{proto.package}." if proto.package else ""
    symbols = set[str]()
    for service in proto.service:
        symbols |= _with_members(prefix + service.name, service.method)
    for enum in proto.enum_type:
        symbols |= _enum_symbols(prefix, enum)
    for message in proto.message_type:
        symbols |= _message_symbols(prefix, message)
    return symbols | {prefix + extension.name for extension in proto.extension}


def _message_symbols(prefix: str, message: Any) -> set[str]:
    name = prefix + message.name
    symbols = _with_members(name, [*message.field, *message.oneof_decl, *message.extension])
    for enum in message.enum_type:
        symbols |= _enum_symbols(f"{name}.", enum)
    for nested in message.nested_type:
        symbols |= _message_symbols(f"{name}.", nested)
    return symbols


def _enum_symbols(prefix: str, enum: Any) -> set[str]:
    """Return an enum's names. In protobuf, values have the scope of their enum; clients also ask for `Enum.VALUE`."""
    return _with_members(prefix + enum.name, enum.value) | {prefix + value.name for value in enum.value}


def _with_members(name: str, members: Any) -> set[str]:
    return {name, *(f"{name}.{member.name}" for member in members)}
