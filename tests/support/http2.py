"""Bytes of gRPC calls, for clients that behave as no library does."""

from yuan_grpc.v1 import yuan_pb2 as pb

REQUEST = pb.GenerateRequest(prompt="AB")
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
NO_FIELDS: dict[bytes, bytes] = {}


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Return a frame of HTTP/2."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def encode_stream_call(more_fields: dict[bytes, bytes] = NO_FIELDS) -> bytes:
    """Return the bytes of a connection that calls GenerateStream."""
    fields = {b":method": b"POST", b":scheme": b"http", b":path": b"/yuan.v1.YuanService/GenerateStream"}
    fields |= {b":authority": b"localhost", b"content-type": b"application/grpc", b"te": b"trailers"}
    fields |= more_fields
    block = b"".join(b"\0%c%b%c%b" % (len(name), name, len(value), value) for name, value in fields.items())
    message = REQUEST.SerializeToString()
    data = b"\0" + len(message).to_bytes(4, "big") + message
    return PREFACE + frame(4, 0, 0) + frame(1, 4, 1, block) + frame(0, 1, 1, data)
