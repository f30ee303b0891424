"""`yuan-grpc run`: answers of a model that is loaded for them, without a server."""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from typing import Any

from yuan_grpc.cli import generate
from yuan_grpc.cli.common import connection
from yuan_grpc.cli.common.errors import UsageError
from yuan_grpc.cli.common.progress import Progress
from yuan_grpc.server import settings

EPILOG = """\
What stands behind -- goes to vLLM's engine as it is:
  yuan-grpc run "..." --model /models/Yuan2-2B -- --dtype bfloat16 --max-model-len 4096
"""


def add_command(commands: Any) -> None:
    """Declares the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "run",
        help="load a model, answer prompts and end",
        description="Loads a model, answers prompts, several at a time, and ends. The answers are a server's.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        conflict_handler="resolve",  # --model is the checkpoint here, and no adapter
    )
    parser.add_argument("prompt", nargs="*", help="the texts; with none, stdin is one")
    generate.add_options(parser)
    settings.add_model_options(parser, os.environ)
    parser.set_defaults(run=connection.at_the_edge(_run), engine_flags=[], address="", **connection.PRIVATE)


def _run(options: argparse.Namespace) -> int:
    model, options.model = options.model, None
    requests = generate.requests_of(options.prompt, options)
    with ExitStack() as stack:
        with Progress("loading the model"):
            try:
                from yuan_grpc import offline

                engine = offline.listening(model, *options.engine_flags, lora_folder=options.lora_folder)
                options.address = stack.enter_context(engine)
            except ModuleNotFoundError as missing:
                raise UsageError(f"a model needs {missing.name}: install yuan-grpc[cuda] or yuan-grpc[cpu]") from None
            except ValueError as error:
                raise UsageError(f"{model} cannot be loaded: {error}") from None
        return generate.answer(requests, options)
