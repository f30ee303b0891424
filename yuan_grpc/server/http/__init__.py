"""The calls that Yuan's callers made over HTTP, and OpenAI's: another way to the answers that gRPC gives."""

from yuan_grpc.server.http.listener import Listener

__all__ = ["Listener"]
