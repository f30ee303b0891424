"""Yuan 2.0 over gRPC: the client, the generated stubs, the server, and the vLLM plugin with the model."""

from typing import TYPE_CHECKING

__version__: str
"""The version of the installed package."""

if not TYPE_CHECKING:  # to a type checker, this function would give the module every attribute

    def __getattr__(name: str) -> str:
        # Read at first use: importing importlib.metadata takes a fifth of the time of importing the client.
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib.metadata import version

        globals()[name] = version("yuan-grpc")
        return globals()[name]
