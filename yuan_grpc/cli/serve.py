"""`yuan-grpc serve`: serve a model over gRPC."""

import argparse
import asyncio
import logging
import os
import sys
from typing import Any

from yuan_grpc.cli.commands import SUMMARIES
from yuan_grpc.cli.common.engine_help import add_help_option
from yuan_grpc.cli.common.install import missing_package
from yuan_grpc.server import log_queue, settings, signals
from yuan_grpc.server.engine.vllm import env


def add_command(commands: Any) -> None:
    """Add the command to the subparsers. Its options are declared in `settings`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "serve", help=SUMMARIES["serve"], allow_abbrev=False, add_help=False
    )
    add_help_option(parser)
    settings.add_options(parser, os.environ)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
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
        import uvloop

        from yuan_grpc.server import server

        print(server.startup_banner(config), file=sys.stderr, flush=True)  # before vLLM, which takes seconds to import
        from yuan_grpc.server.engine.vllm.args import parse_engine_flags
        from yuan_grpc.server.engine.vllm.engine import VllmEngine
    except ModuleNotFoundError as error:
        print(f"yuan-grpc: {missing_package(error)}", file=sys.stderr)
        return 1
    try:
        flags = parse_engine_flags(config.vllm_flags)
    except (ValueError, OSError) as error:
        print(f"yuan-grpc: {config.model} cannot be served: {error}", file=sys.stderr)
        return 1
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(server.serve(config, VllmEngine(flags, config.lora_folder)))
