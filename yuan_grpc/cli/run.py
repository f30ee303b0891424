"""`yuan-grpc run`: load a model, complete prompts and exit, without a server."""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from typing import Any

from yuan_grpc.cli import generate
from yuan_grpc.cli.commands import SUMMARIES
from yuan_grpc.cli.common import connection
from yuan_grpc.cli.common.errors import UsageError, handle_errors
from yuan_grpc.cli.common.install import missing_package
from yuan_grpc.cli.common.progress import Progress
from yuan_grpc.cli.common.terminal import print_note
from yuan_grpc.server import settings
from yuan_grpc.server.engine.vllm import env, openmp
from yuan_grpc.server.settings import Settings
from yuan_grpc.server.start_error import StartError

EPILOG = """\
Options after -- are passed to vLLM; `yuan-grpc serve --help=all` lists them:
  yuan-grpc run "..." --model /models/Yuan2-2B -- --max-model-len 4096
"""


def add_command(commands: Any) -> None:
    """Add the command to the subparsers."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "run",
        help=SUMMARIES["run"],
        description="Load a model, complete prompts concurrently, and exit. Results equal a server's.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        conflict_handler="resolve",  # --model names the checkpoint here, not an adapter
    )
    parser.add_argument("prompt", nargs="*", help="prompt texts; - or nothing reads one from stdin")
    generate.add_options(parser)
    settings.add_model_options(parser, os.environ)
    parser.set_defaults(run=handle_errors(_run), engine_flags=[], address="", **connection.LOCAL_ENGINE)


def _run(options: argparse.Namespace) -> int:
    from yuan_grpc import preflight
    from yuan_grpc.preflight import machine

    if machine.is_cpu_build():
        openmp.restart_with_library("run")
    model, options.model = options.model, None
    requests = generate.read_requests(options.prompt, options)
    with ExitStack() as stack:
        try:
            env.set_defaults()
            preflight.check_engine(Settings(model, "", 0, 0, tuple(options.engine_flags)))
            print_note("importing vLLM")
            from yuan_grpc import offline
            from yuan_grpc.server.engine.vllm import warm_fork

            warm_fork.start()  # before the progress bar starts a thread
            with Progress("loading the model"):
                engine = offline.serve_model(model, *options.engine_flags, lora_folder=options.lora_folder)
                options.address = stack.enter_context(engine)
        except ModuleNotFoundError as error:
            raise UsageError(missing_package(error)) from None
        except (ValueError, StartError) as error:
            raise UsageError(f"{model} cannot be loaded: {error}") from None
        return generate.run_requests(requests, options)
