"""A fake service on plain grpcio, for tests of the connection instead of the service."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from yuan_grpc.v1 import yuan_pb2 as pb
from yuan_grpc.v1 import yuan_pb2_grpc

CODES = grpc.StatusCode


@dataclass
class FakeService(yuan_pb2_grpc.YuanServiceServicer):
    """A service that fails one call with each code of `failures` and then generates its own name.

    `attempts` records the metadata of every call; `pushback` is sent with each failure as `grpc-retry-pushback-ms`.
    """

    name: str = "ok"
    failures: list[grpc.StatusCode] = field(default_factory=list)
    pushback: str | None = None
    attempts: list[dict[str, Any]] = field(default_factory=list)

    def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        self._record_and_fail(context)
        return pb.GenerateResponse(choices=[self._choice()])

    def GenerateStream(self, request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateStreamResponse]:
        if request.prompt == "late":
            yield pb.GenerateStreamResponse(request_id="from-server", choices=[pb.Choice(text=self.name)])
        self._record_and_fail(context)
        yield pb.GenerateStreamResponse(choices=[self._choice()])

    def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortResponse:
        self._record_and_fail(context)
        return pb.AbortResponse()

    def LoadLora(self, request: pb.LoadLoraRequest, context: Any) -> pb.LoadLoraResponse:
        self._record_and_fail(context)
        return pb.LoadLoraResponse()

    def UnloadLora(self, request: pb.UnloadLoraRequest, context: Any) -> pb.UnloadLoraResponse:
        self._record_and_fail(context)
        return pb.UnloadLoraResponse()

    def _choice(self) -> pb.Choice:
        return pb.Choice(text=self.name, finish_reason=pb.FINISH_REASON_LENGTH)

    def _record_and_fail(self, context: Any) -> None:
        self.attempts.append(dict(context.invocation_metadata()))
        if self.failures:
            if self.pushback is not None:
                context.set_trailing_metadata((("grpc-retry-pushback-ms", self.pushback),))
            context.abort(self.failures.pop(0), "failed on purpose")


@contextmanager
def running(
    service: FakeService, credentials: "grpc.ServerCredentials | None" = None, address: str = "127.0.0.1:0"
) -> Iterator[str]:
    """Serve on a free port and yield `host:port`; an address with a fixed port or without one is yielded unchanged."""
    server = grpc.server(ThreadPoolExecutor(8))
    yuan_pb2_grpc.add_YuanServiceServicer_to_server(service, server)
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    server.start()
    try:
        yield f"127.0.0.1:{port}" if address.endswith(":0") else address
    finally:
        server.stop(None).wait()
