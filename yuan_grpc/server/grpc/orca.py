"""Load reports for balancers (ORCA): in the trailers of calls, and as a stream, `xds.service.orca.v3.OpenRcaService`.

gRPC clients with the policy `weighted_round_robin`, Envoy with `client_side_weighted_round_robin`, and meshes read
them. The messages are defined here in a pool of their own: the package xds-protos would replace files of
googleapis-common-protos, and would define them in the default pool.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.duration_pb2 import DESCRIPTOR as DURATION

from yuan_grpc.server.engine.load import EngineLoad, kv_cache_usage, utilization

TRAILER = "endpoint-load-metrics-bin"
SERVICE = "xds.service.orca.v3.OpenRcaService"
METHOD = "StreamCoreMetrics"

MIN_INTERVAL = 1.0
"""Minimum interval between two reports of a stream, in seconds. Also the default, if the client sets none."""

RATE_SECONDS = 10.0
"""Time over which calls per second are measured, in seconds."""

_FIELD = FieldDescriptorProto
_DOUBLES = {"cpu_utilization": 1, "mem_utilization": 2, "rps_fractional": 6, "eps": 7, "application_utilization": 9}
_MAPS = {"request_cost": 4, "utilization": 5, "named_metrics": 8}


def _report_file() -> FileDescriptorProto:
    file = FileDescriptorProto(
        name="xds/data/orca/v3/orca_load_report.proto", package="xds.data.orca.v3", syntax="proto3"
    )
    message = file.message_type.add(name="OrcaLoadReport")
    for name, number in _DOUBLES.items():
        message.field.add(name=name, number=number, type=_FIELD.TYPE_DOUBLE, label=_FIELD.LABEL_OPTIONAL)
    message.field.add(name="rps", number=3, type=_FIELD.TYPE_UINT64, label=_FIELD.LABEL_OPTIONAL)
    for name, number in _MAPS.items():
        entry = message.nested_type.add(name="".join(part.title() for part in name.split("_")) + "Entry")
        entry.options.map_entry = True
        entry.field.add(name="key", number=1, type=_FIELD.TYPE_STRING, label=_FIELD.LABEL_OPTIONAL)
        entry.field.add(name="value", number=2, type=_FIELD.TYPE_DOUBLE, label=_FIELD.LABEL_OPTIONAL)
        kind = f".xds.data.orca.v3.OrcaLoadReport.{entry.name}"
        message.field.add(
            name=name, number=number, type=_FIELD.TYPE_MESSAGE, type_name=kind, label=_FIELD.LABEL_REPEATED
        )
    return file


def _service_file() -> FileDescriptorProto:
    file = FileDescriptorProto(name="xds/service/orca/v3/orca.proto", package="xds.service.orca.v3", syntax="proto3")
    file.dependency.extend(["xds/data/orca/v3/orca_load_report.proto", DURATION.name])
    request = file.message_type.add(name="OrcaLoadReportRequest")
    request.field.add(
        name="report_interval",
        number=1,
        type=_FIELD.TYPE_MESSAGE,
        type_name=".google.protobuf.Duration",
        label=_FIELD.LABEL_OPTIONAL,
    )
    request.field.add(name="request_cost_names", number=2, type=_FIELD.TYPE_STRING, label=_FIELD.LABEL_REPEATED)
    file.service.add(name="OpenRcaService").method.add(
        name=METHOD,
        input_type=".xds.service.orca.v3.OrcaLoadReportRequest",
        output_type=".xds.data.orca.v3.OrcaLoadReport",
        server_streaming=True,
    )
    return file


def _create_pool() -> DescriptorPool:
    pool = DescriptorPool()
    pool.AddSerializedFile(DURATION.serialized_pb)
    for file in (_report_file(), _service_file()):
        pool.AddSerializedFile(file.SerializeToString())
    return pool


POOL = _create_pool()
"""The definitions, for reflection."""

_messages = message_factory.GetMessageClassesForFiles(
    ["xds/data/orca/v3/orca_load_report.proto", "xds/service/orca/v3/orca.proto"], POOL
)
OrcaLoadReport: Any = _messages["xds.data.orca.v3.OrcaLoadReport"]
OrcaLoadReportRequest: Any = _messages["xds.service.orca.v3.OrcaLoadReportRequest"]


class CallRate:
    """Calls and failed calls per second, over the last `RATE_SECONDS`.

    It counts the calls of one process: a balancer compares servers with the same number of processes.
    """

    def __init__(self) -> None:
        self._seconds = deque[tuple[int, int, int]]()
        self._created = time.monotonic()

    def count(self, *, failed: bool) -> None:
        """Count a call that has ended."""
        now, calls, failures = int(time.monotonic()), 0, 0
        if self._seconds and self._seconds[-1][0] == now:
            _, calls, failures = self._seconds.pop()
        self._seconds.append((now, calls + 1, failures + failed))
        self._forget(now)

    def read(self) -> tuple[float, float]:
        """Return calls per second and failed calls per second."""
        now = time.monotonic()
        self._forget(int(now))
        seconds = max(min(now - self._created, RATE_SECONDS), 1.0)
        calls, failures = (sum(second[column] for second in self._seconds) for column in (1, 2))
        return calls / seconds, failures / seconds

    def _forget(self, now: int) -> None:
        while self._seconds and self._seconds[0][0] <= now - RATE_SECONDS:
            self._seconds.popleft()


class LoadReporter:
    """Creates reports.

    Args:
        read_loads: a function that returns the loads of the engine; none before it is ready.
    """

    def __init__(self, read_loads: Callable[[], Sequence[EngineLoad]]) -> None:
        self._read_loads = read_loads
        self.rate = CallRate()

    def report(self) -> Any:
        """Return a report of the current load."""
        loads, (calls, failures) = self._read_loads(), self.rate.read()
        return OrcaLoadReport(
            application_utilization=utilization(loads),
            mem_utilization=kv_cache_usage(loads),
            rps_fractional=calls,
            eps=failures,
            # vLLM has these names in its header `endpoint-load-metrics`.
            named_metrics={
                "kv_cache_usage_perc": kv_cache_usage(loads),
                "num_requests_running": sum(load.num_running for load in loads),
                "num_requests_waiting": sum(load.num_waiting for load in loads),
            },
        )

    async def stream(self, request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> AsyncIterator[Any]:
        """Yield a report now and after each interval, until the client ends the call."""
        interval = max(request.report_interval.ToTimedelta().total_seconds(), MIN_INTERVAL)
        while True:
            yield self.report()
            await asyncio.sleep(interval)

    def attach(self, server: grpc.aio.Server) -> None:
        """Register the service on a server that has not started yet."""
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            METHOD: grpc.unary_stream_rpc_method_handler(
                self.stream,
                request_deserializer=OrcaLoadReportRequest.FromString,
                response_serializer=OrcaLoadReport.SerializeToString,
            )
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        server.add_registered_method_handlers(SERVICE, handlers)


class LoadReportInterceptor(grpc.aio.ServerInterceptor):
    """An interceptor that adds a report to the trailers of each call of our services, including failed ones.

    It must run inside `StatusInterceptor`, which adds the trailers that it finds to a status.
    """

    def __init__(self, reporter: LoadReporter, services: Sequence[str]) -> None:
        self._reporter = reporter
        self._prefixes = tuple(f"/{service}/" for service in services)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Wrap the handlers of our services."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(self._prefixes):
            return handler
        codecs = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.stream_stream:
            return grpc.stream_stream_rpc_method_handler(self._wrap(handler.stream_stream), **codecs)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(self._wrap(handler.unary_stream), **codecs)
        return grpc.unary_unary_rpc_method_handler(self._wrap(handler.unary_unary), **codecs)

    def _wrap(self, handler: Any) -> Any:
        async def wrapped(request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:
            failed = True
            try:
                response = await handler(request, context)
                failed = False
                return response
            finally:
                self._reporter.rate.count(failed=failed)
                context.set_trailing_metadata(((TRAILER, self._reporter.report().SerializeToString()),))

        return wrapped
