"""A gRPC server that answers with raw bytes, codes and trailers, for tests of broken and hostile servers."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import Message

Answer = Message | bytes


@dataclass
class HostileServer(grpc.GenericRpcHandler):
    """A handler of every method. Methods are given by their short names, such as `Generate`.

    Attributes:
        answers: the messages of each method, sent before the status.
        code: the status code of every call; None for OK.
        details: the status message.
        trailers: the trailing metadata.
        attempts: the short name of the method of every call, also of those whose request is too large to be read.
        compression: the compression of the messages.
    """

    answers: Mapping[str, Sequence[Answer]] = field(default_factory=dict)
    code: grpc.StatusCode | None = None
    details: str = ""
    trailers: Sequence[tuple[str, str | bytes]] = ()
    compression: grpc.Compression = grpc.Compression.NoCompression
    attempts: list[str] = field(default_factory=list)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Return the handler of a method."""
        name = handler_call_details.method.rpartition("/")[2]
        self.attempts.append(name)

        def answer(_: bytes, context: Any) -> Iterator[bytes]:
            if self.trailers:
                context.set_trailing_metadata(tuple(self.trailers))
            for message in self.answers.get(name, ()):
                yield message.SerializeToString() if isinstance(message, Message) else message
            if self.code is not None:
                context.abort(self.code, self.details)

        return grpc.unary_stream_rpc_method_handler(answer)


@contextmanager
def serve(server: HostileServer) -> Iterator[str]:
    """Serve on a free port and yield the address."""
    grpc_server = grpc.server(ThreadPoolExecutor(4), handlers=[server], compression=server.compression)
    port = grpc_server.add_insecure_port("127.0.0.1:0")
    grpc_server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        grpc_server.stop(None).wait()
