"""Yuan 2.0 over gRPC: the client, the generated stubs, the server, and the vLLM plugin with the model."""

from importlib.metadata import version

__version__ = version("yuan-grpc")
