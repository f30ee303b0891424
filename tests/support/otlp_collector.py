"""A collector of OTLP spans on a free port."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


@dataclass(frozen=True)
class Span:
    """A received span, with its ids in hexadecimal."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: int
    status: int
    fields: dict[str, Any]
    resource: dict[str, Any]


def _values(attributes: Any) -> dict[str, Any]:
    return {item.key: getattr(item.value, str(item.value.WhichOneof("value"))) for item in attributes}


class _Service(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.spans: list[Span] = []

    def Export(self, request: Any, context: Any) -> Any:
        for resource_spans in request.resource_spans:
            resource = _values(resource_spans.resource.attributes)
            for span in (span for scope in resource_spans.scope_spans for span in scope.spans):
                ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
                values = _values(span.attributes)
                self.spans.append(Span(span.name, *ids, span.kind, span.status.code, values, resource))
        return trace_service_pb2.ExportTraceServiceResponse()


@contextmanager
def collect_spans() -> Iterator[tuple[str, list[Span]]]:
    """Yield the endpoint of a collector, and the list of the spans that it has received."""
    server, service = grpc.server(ThreadPoolExecutor(1)), _Service()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}", service.spans
    finally:
        server.stop(None).wait()
