"""A small service on grpcio alone, for what is about the way to a server and not about ours."""

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
class LittleService(yuan_pb2_grpc.YuanServiceServicer):
    """Answers every generation with its own name, after it has refused as many calls as `refusals` has codes."""

    name: str = "ok"
    refusals: list[grpc.StatusCode] = field(default_factory=list)
    pushback: str | None = None
    attempts: list[dict[str, Any]] = field(default_factory=list)

    def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        self._take(context)
        return pb.GenerateResponse(choices=[pb.Choice(text=self.name)])

    def GenerateStream(self, request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateStreamResponse]:
        if request.prompt == "late":
            yield pb.GenerateStreamResponse(request_id="told", choices=[pb.Choice(text=self.name)])
        self._take(context)
        yield pb.GenerateStreamResponse(choices=[pb.Choice(text=self.name)])

    def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortResponse:
        self._take(context)
        return pb.AbortResponse()

    def LoadLora(self, request: pb.LoadLoraRequest, context: Any) -> pb.LoadLoraResponse:
        self._take(context)
        return pb.LoadLoraResponse()

    def UnloadLora(self, request: pb.UnloadLoraRequest, context: Any) -> pb.UnloadLoraResponse:
        self._take(context)
        return pb.UnloadLoraResponse()

    def _take(self, context: Any) -> None:
        self.attempts.append(dict(context.invocation_metadata()))
        if self.refusals:
            if self.pushback is not None:
                context.set_trailing_metadata((("grpc-retry-pushback-ms", self.pushback),))
            context.abort(self.refusals.pop(0), "refused")


@contextmanager
def running(
    service: LittleService, credentials: "grpc.ServerCredentials | None" = None, address: str = "127.0.0.1:0"
) -> Iterator[str]:
    """The service behind a port of its own; yields `host:port`, or the address as it is if it has no port."""
    server = grpc.server(ThreadPoolExecutor(8))
    yuan_pb2_grpc.add_YuanServiceServicer_to_server(service, server)
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    server.start()
    try:
        yield f"127.0.0.1:{port}" if address.endswith(":0") else address
    finally:
        server.stop(None).wait()
