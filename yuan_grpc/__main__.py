"""The command `yuan-grpc`."""

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Sequence

from yuan_grpc import __version__
from yuan_grpc.server import settings

ENGINE_DEFAULTS = {
    "VLLM_NO_USAGE_STATS": "1",  # no telemetry unless the operator turns it on
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork of a process with gRPC's threads can hang
}
"""Variables vLLM reads when it is imported, where the operator has not set them."""


def set_engine_defaults() -> None:
    """Fills in `ENGINE_DEFAULTS`. For before vLLM is imported."""
    for variable, value in ENGINE_DEFAULTS.items():
        os.environ.setdefault(variable, value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the process's exit status."""
    parser = argparse.ArgumentParser(prog="yuan-grpc", description="Yuan 2.0 over gRPC, on vLLM.")
    parser.add_argument("--version", action="version", version=f"yuan-grpc {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    serving = commands.add_parser("serve", help="serve a model", allow_abbrev=False)
    settings.add_options(serving, os.environ)
    return _serve(settings.read(*parser.parse_known_args(arguments)))


def _serve(chosen: settings.Settings) -> int:
    set_engine_defaults()
    try:
        from yuan_grpc.server import serve

        print(serve.greeting(chosen), file=sys.stderr, flush=True)  # before vLLM, which takes seconds to import
        from yuan_grpc.server import engine
    except ModuleNotFoundError as missing:
        print(f"yuan-grpc: serving needs {missing.name}: install yuan-grpc[cuda] or yuan-grpc[cpu]", file=sys.stderr)
        return 1
    try:
        options = engine.read_engine_flags(chosen.vllm_flags)
    except (ValueError, OSError) as error:
        print(f"yuan-grpc: {chosen.model} cannot be served: {error}", file=sys.stderr)
        return 1
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    return asyncio.run(serve.serve(chosen, engine.VllmEngine(options)))


if __name__ == "__main__":
    sys.exit(main())
