"""A span for each call, which continues the caller's trace and is continued by the spans of the engine.

The interceptor of OpenTelemetry for grpcio's asyncio server is not used: it does not pass on handlers that write their
messages instead of yielding them, and it does not cover HTTP.
"""

import os

import grpc
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from yuan_grpc import __version__
from yuan_grpc.server.core.access_log import Outcome
from yuan_grpc.server.telemetry import attributes

PROTOCOL_VARIABLE = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
"""Selects the protocol, as for the engine's spans: `grpc`, the default, or `http/protobuf`."""
SERVICE_NAME = "yuan-grpc"

_CALLER_ERRORS = (
    grpc.StatusCode.OK,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNAUTHENTICATED,
)
"""Statuses that are no error of the server, as OpenTelemetry defines it."""


def create_provider(endpoint: str) -> TracerProvider:
    """Return a provider that sends spans to a collector. `OTEL_` variables set its name, sampler and batches."""
    name = os.environ.setdefault("OTEL_SERVICE_NAME", SERVICE_NAME)
    resource = Resource.create({"service.name": name, "service.version": __version__})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(_create_exporter(endpoint)))
    return provider


def _create_exporter(endpoint: str) -> SpanExporter:
    if os.environ.get(PROTOCOL_VARIABLE, "grpc") == "http/protobuf":
        return HttpExporter(endpoint=endpoint)
    return GrpcExporter(endpoint=endpoint, insecure=not endpoint.startswith("https:"))


class CallTracer:
    """An observer of calls that gives each a span.

    Args:
        tracer: creates the spans.
        service: the name of the gRPC service.
    """

    def __init__(self, tracer: Tracer, service: str) -> None:
        self._tracer = tracer
        self._service = service
        self._propagator = TraceContextTextMapPropagator()
        self._spans: dict[Outcome, Span] = {}

    def begin(self, outcome: Outcome) -> None:
        """Start a span, and let the call's own spans continue it."""
        parent = self._propagator.extract(outcome.trace_headers)
        name, fields = self._describe(outcome.method)
        span = self._tracer.start_span(name, parent, SpanKind.SERVER, fields)
        headers: dict[str, str] = {}
        self._propagator.inject(headers, set_span_in_context(span))
        outcome.trace_headers = headers
        self._spans[outcome] = span

    def _describe(self, method: str) -> tuple[str, dict[str, str]]:
        """Return the name of a span and its attributes, for a method of gRPC or for a method and route of HTTP."""
        http_method, _, route = method.rpartition(" ")
        if http_method:
            return method, {attributes.HTTP_METHOD: http_method, attributes.HTTP_ROUTE: route}
        fields = {attributes.RPC_SYSTEM: "grpc", attributes.RPC_SERVICE: self._service, attributes.RPC_METHOD: method}
        return f"{self._service}/{method}", fields

    def end(self, outcome: Outcome, seconds: float) -> None:
        """End the span of a call."""
        span = self._spans.pop(outcome)
        if span.is_recording():
            span.set_attributes(_attributes(outcome))
            if outcome.code not in _CALLER_ERRORS:
                span.set_status(Status(StatusCode.ERROR, outcome.code.name))
        span.end()


def _attributes(outcome: Outcome) -> dict[str, str | int | float]:
    fields: dict[str, str | int | float | None] = {
        attributes.RPC_STATUS_CODE: outcome.code.value[0],
        attributes.ERROR_TYPE: outcome.reason or None,
        attributes.CLIENT_ADDRESS: outcome.peer or None,
        attributes.END_USER: outcome.caller or None,
        attributes.RESPONSE_ID: outcome.subject or None,
    }
    if outcome.requests:
        first = outcome.requests[0]
        fields |= {
            attributes.OPERATION: "text_completion",
            attributes.RESPONSE_MODEL: first.model,
            attributes.INPUT_TOKENS: sum(stats.prompt_tokens for stats in outcome.requests),
            attributes.OUTPUT_TOKENS: sum(stats.completion_tokens for stats in outcome.requests),
            attributes.QUEUE_SECONDS: first.queue_seconds,
            attributes.PREFILL_SECONDS: first.prefill_seconds,
            attributes.FIRST_TOKEN_SECONDS: first.first_token_seconds,
            attributes.DECODE_SECONDS: first.decode_seconds,
        }
    return {name: value for name, value in fields.items() if value is not None}
