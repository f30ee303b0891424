"""`yuan-grpc serve`: serve a model over gRPC."""

import argparse
import asyncio
import logging
import os
import sys
from typing import Any

from yuan_grpc.server import log_queue, settings, signals
from yuan_grpc.server.engine.vllm import env


def add_command(commands: Any) -> None:
    """Add the command to the subparsers. Its options are declared in `settings`."""
    parser: argparse.ArgumentParser = commands.add_parser("serve", help="serve a model over gRPC", allow_abbrev=False)
    settings.add_options(parser, os.environ)
    parser.add_argument("--help-engine", action="store_true", help="list vLLM's engine options and exit")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if options.help_engine:
        return _print_engine_help()
    config = settings.read(options, options.engine_flags)
    log_queue.install()
    signals.exit_on_stop_signals()
    os.umask(env.OWN_UMASK)
    try:
        env.set_defaults()
    except OSError as error:
        print(f"yuan-grpc: {error}", file=sys.stderr)
        return 1
    try:
        from yuan_grpc.server import server

        print(server.startup_banner(config), file=sys.stderr, flush=True)  # before vLLM, which takes seconds to import
        from yuan_grpc.server.engine.vllm.args import parse_engine_flags
        from yuan_grpc.server.engine.vllm.engine import VllmEngine
    except ModuleNotFoundError as error:
        print(f"yuan-grpc: {error.name} is required: install yuan-grpc[cuda] or yuan-grpc[cpu]", file=sys.stderr)
        return 1
    try:
        flags = parse_engine_flags(config.vllm_flags)
    except (ValueError, OSError) as error:
        print(f"yuan-grpc: {config.model} cannot be served: {error}", file=sys.stderr)
        return 1
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    return asyncio.run(server.serve(config, VllmEngine(flags, config.lora_folder)))


def _print_engine_help() -> int:
    env.set_defaults()
    from yuan_grpc.server.engine.vllm.args import engine_help

    print(engine_help())
    return 0
