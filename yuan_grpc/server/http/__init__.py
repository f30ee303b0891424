"""The HTTP API: the original demo server's `/generate`, and OpenAI's completions and chat."""

from yuan_grpc.server.http.listener import Listener

__all__ = ["Listener"]
