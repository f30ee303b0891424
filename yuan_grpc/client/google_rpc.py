"""Messages of `google.rpc` and of the gRPC health service, defined at run time.

The client must install with grpcio and protobuf alone. googleapis-common-protos would add a 0.3 MB wheel (0.8 MB and
199 files installed) and its own protobuf pins for three messages, and the health messages would still be missing.

The messages live in a private descriptor pool, so they do not collide with those of googleapis-common-protos or
grpcio-health-checking in protobuf's default pool.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import duration_pb2
from google.protobuf.descriptor_pb2 import FieldDescriptorProto as Field
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

_STRING = {"type": Field.TYPE_STRING, "label": Field.LABEL_OPTIONAL}
_DURATION = {"type": Field.TYPE_MESSAGE, "type_name": ".google.protobuf.Duration", "label": Field.LABEL_OPTIONAL}
_VIOLATIONS = {
    "type": Field.TYPE_MESSAGE,
    "type_name": ".google.rpc.BadRequest.FieldViolation",
    "label": Field.LABEL_REPEATED,
}


def _add_message(parent: Any, name: str, fields: dict[str, Any]) -> Any:
    """Add a message to a file or to another message; fields are numbered from 1 in their order."""
    message = parent.add(name=name)
    for number, (field, kind) in enumerate(fields.items(), start=1):
        message.field.add(name=field, number=number, **kind)
    return message


def _google_rpc() -> FileDescriptorProto:
    file = FileDescriptorProto(name="yuan_grpc/client/google_rpc.proto", package="google.rpc", syntax="proto3")
    file.dependency.append(duration_pb2.DESCRIPTOR.name)
    _add_message(file.message_type, "ErrorInfo", {"reason": _STRING, "domain": _STRING})
    _add_message(file.message_type, "RetryInfo", {"retry_delay": _DURATION})
    bad_request = _add_message(file.message_type, "BadRequest", {"field_violations": _VIOLATIONS})
    _add_message(bad_request.nested_type, "FieldViolation", {"field": _STRING, "description": _STRING})
    return file


def _health() -> FileDescriptorProto:
    file = FileDescriptorProto(name="yuan_grpc/client/health.proto", package="grpc.health.v1", syntax="proto3")
    # An enum is an integer on the wire; HEALTH_STATUSES below has the names.
    status = {"type": Field.TYPE_INT32, "label": Field.LABEL_OPTIONAL}
    _add_message(file.message_type, "HealthCheckRequest", {"service": _STRING})
    _add_message(file.message_type, "HealthCheckResponse", {"status": status})
    return file


_pool = DescriptorPool()
_pool.AddSerializedFile(duration_pb2.DESCRIPTOR.serialized_pb)
for _file in (_google_rpc(), _health()):
    _pool.AddSerializedFile(_file.SerializeToString())


def _message_class(name: str) -> Any:
    return GetMessageClass(_pool.FindMessageTypeByName(name))


ErrorInfo = _message_class("google.rpc.ErrorInfo")
RetryInfo = _message_class("google.rpc.RetryInfo")
BadRequest = _message_class("google.rpc.BadRequest")
HealthCheckRequest = _message_class("grpc.health.v1.HealthCheckRequest")
HealthCheckResponse = _message_class("grpc.health.v1.HealthCheckResponse")

HEALTH_WATCH = "/grpc.health.v1.Health/Watch"
SERVING = 1
HEALTH_STATUSES = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")
