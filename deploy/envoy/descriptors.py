"""The descriptors for Envoy's JSON transcoder: `python deploy/envoy/descriptors.py >deploy/envoy/yuan.binpb`.

They contain the details of errors too, which the transcoder converts to JSON.
"""

import sys

from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from google.rpc import error_details_pb2

from yuan_grpc.v1 import yuan_pb2


def describe() -> FileDescriptorSet:
    """Return the descriptors of the service with all imports, each after those it imports."""
    files: dict[str, FileDescriptorProto] = {}
    for module in (yuan_pb2, error_details_pb2):
        _add(module.DESCRIPTOR, files)
    return FileDescriptorSet(file=files.values())


def _add(file: object, files: dict[str, FileDescriptorProto]) -> None:
    for dependency in file.dependencies:  # type: ignore[attr-defined]
        _add(dependency, files)
    proto = FileDescriptorProto()
    file.CopyToProto(proto)  # type: ignore[attr-defined]
    files.setdefault(proto.name, proto)


if __name__ == "__main__":
    sys.stdout.buffer.write(describe().SerializeToString(deterministic=True))
