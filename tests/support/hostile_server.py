"""Servers that answer with any bytes, for tests of broken and hostile servers: as messages of gRPC, or as frames."""

import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import grpc
from google.protobuf.message import Message

Answer = Message | bytes

HEADERS, SETTINGS, GOAWAY = 1, 4, 7
"""Kinds of HTTP/2 frames."""
END_STREAM, END_HEADERS = 1, 4
"""Flags of HEADERS."""
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


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


@contextmanager
def serve_frames(answer: Callable[[int], bytes]) -> Iterator[str]:
    """Serve HTTP/2 on a free port and yield the address.

    Args:
        answer: returns the bytes to send for a call, given the ID of its stream. The connection then ends.
    """

    def accept_connections() -> None:
        with suppress(OSError):  # the listener is closed
            while True:
                connection, _ = listener.accept()
                with suppress(OSError), connection, connection.makefile("rb") as reader:
                    reader.read(len(PREFACE))
                    connection.sendall(frame(SETTINGS, 0, 0, b"") + frame(SETTINGS, 1, 0, b""))
                    connection.sendall(answer(_read_stream_id(reader)))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept_connections, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    """Return an HTTP/2 frame."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream_id.to_bytes(4, "big") + payload


def header(name: bytes, value: bytes) -> bytes:
    """Return a header for HEADERS, neither compressed nor indexed."""
    return b"\0" + _length(name) + name + _length(value) + value


def _length(text: bytes) -> bytes:
    """Return a length as HPACK encodes it: a prefix of 7 bits, then groups of 7 bits."""
    if len(text) < 127:
        return bytes([len(text)])
    encoded, remaining = [127], len(text) - 127
    while remaining >= 128:
        encoded.append(remaining % 128 + 128)
        remaining //= 128
    return bytes([*encoded, remaining])


def _read_stream_id(reader: BinaryIO) -> int:
    """Read frames until a call starts and return the ID of its stream; raise OSError at the end of the connection."""
    while len(head := reader.read(9)) == 9:
        reader.read(int.from_bytes(head[:3], "big"))
        if head[3] == HEADERS:
            return int.from_bytes(head[5:], "big")
    raise OSError
