"""Messages of `google.rpc` and of the health service, for which no package beside protobuf is needed.

They are in a pool of their own: where googleapis-common-protos or grpcio-health-checking is installed too, its messages
of the same names are in protobuf's common one, and the two do not meet.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import duration_pb2
from google.protobuf.descriptor_pb2 import FieldDescriptorProto as Field
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

_TEXTS = {"type": Field.TYPE_STRING, "label": Field.LABEL_OPTIONAL}
_DURATIONS = {"type": Field.TYPE_MESSAGE, "type_name": ".google.protobuf.Duration", "label": Field.LABEL_OPTIONAL}
_VIOLATIONS = {
    "type": Field.TYPE_MESSAGE,
    "type_name": ".google.rpc.BadRequest.FieldViolation",
    "label": Field.LABEL_REPEATED,
}


def _add(message: Any, name: str, fields: dict[str, Any]) -> Any:
    """Adds a message to a file or to another message; fields are numbered from 1 in their order."""
    added = message.add(name=name)
    for number, (field, kind) in enumerate(fields.items(), start=1):
        added.field.add(name=field, number=number, **kind)
    return added


def _google_rpc() -> FileDescriptorProto:
    file = FileDescriptorProto(name="yuan_grpc/client/google_rpc.proto", package="google.rpc", syntax="proto3")
    file.dependency.append(duration_pb2.DESCRIPTOR.name)
    _add(file.message_type, "ErrorInfo", {"reason": _TEXTS, "domain": _TEXTS})
    _add(file.message_type, "RetryInfo", {"retry_delay": _DURATIONS})
    bad = _add(file.message_type, "BadRequest", {"field_violations": _VIOLATIONS})
    _add(bad.nested_type, "FieldViolation", {"field": _TEXTS, "description": _TEXTS})
    return file


def _health() -> FileDescriptorProto:
    file = FileDescriptorProto(name="yuan_grpc/client/health.proto", package="grpc.health.v1", syntax="proto3")
    # On the wire an enum is a number, and this number's names are the constants below.
    status = {"type": Field.TYPE_INT32, "label": Field.LABEL_OPTIONAL}
    _add(file.message_type, "HealthCheckRequest", {"service": _TEXTS})
    _add(file.message_type, "HealthCheckResponse", {"status": status})
    return file


_pool = DescriptorPool()
_pool.AddSerializedFile(duration_pb2.DESCRIPTOR.serialized_pb)
for _file in (_google_rpc(), _health()):
    _pool.AddSerializedFile(_file.SerializeToString())


def _class(name: str) -> Any:
    return GetMessageClass(_pool.FindMessageTypeByName(name))


ErrorInfo = _class("google.rpc.ErrorInfo")
RetryInfo = _class("google.rpc.RetryInfo")
BadRequest = _class("google.rpc.BadRequest")
HealthCheckRequest = _class("grpc.health.v1.HealthCheckRequest")
HealthCheckResponse = _class("grpc.health.v1.HealthCheckResponse")

HEALTH_WATCH = "/grpc.health.v1.Health/Watch"
SERVING = 1
HEALTH_STATUSES = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")
