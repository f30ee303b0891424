"""The command `yuan-grpc`."""

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Sequence

from yuan_grpc import __version__

ENGINE_DEFAULTS = {
    "VLLM_NO_USAGE_STATS": "1",  # no telemetry unless the operator turns it on
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork of a process with gRPC's threads can hang
}
"""Variables vLLM reads when it is imported, where the operator has not set them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the process's exit status."""
    parser = argparse.ArgumentParser(prog="yuan-grpc", description="Yuan 2.0 over gRPC, on vLLM.")
    parser.add_argument("--version", action="version", version=f"yuan-grpc {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    serving = commands.add_parser(
        "serve", help="serve a model", description="Serves a Yuan 2.0 model over gRPC.", allow_abbrev=False
    )

    from yuan_grpc.server import settings

    settings.add_options(serving, os.environ)
    options, engine_flags = parser.parse_known_args(arguments)
    for variable, value in ENGINE_DEFAULTS.items():
        os.environ.setdefault(variable, value)
    try:
        from yuan_grpc.server import engine, serve
    except ModuleNotFoundError as missing:
        if (missing.name or "").startswith("yuan_grpc"):
            raise
        print(f"yuan-grpc: serving needs {missing.name}: install yuan-grpc[cuda] or yuan-grpc[cpu]", file=sys.stderr)
        return 1
    if options.engine_help:
        print(engine.engine_help())
        return 0
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    chosen = settings.read(options, engine_flags)
    try:
        config = engine.read_engine_flags(chosen.vllm_flags)
    except (ValueError, OSError) as error:
        print(f"yuan-grpc: {chosen.model} cannot be served: {error}", file=sys.stderr)
        return 1
    return asyncio.run(serve.serve(chosen, engine.VllmEngine(config)))


if __name__ == "__main__":
    sys.exit(main())
