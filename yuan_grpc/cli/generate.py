"""`yuan-grpc generate`: stream the completion of one prompt, or complete many."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from yuan_grpc.cli.commands import SUMMARIES
from yuan_grpc.cli.common import connection, prompts, request_fields
from yuan_grpc.cli.common.errors import UsageError, handle_errors
from yuan_grpc.cli.common.output import Output
from yuan_grpc.cli.common.progress import Progress
from yuan_grpc.cli.common.rates import ReplyTimer
from yuan_grpc.cli.common.signals import InterruptibleLoop
from yuan_grpc.cli.common.terminal import is_terminal, print_note
from yuan_grpc.cli.generate_many import PromptBatch
from yuan_grpc.client import AsyncClient, YuanError
from yuan_grpc.v1 import yuan_pb2 as pb

MAX_TOKENS = 256
"""Default of `--max-tokens`. The API's default of 16 is too short for reading."""

EPILOG = """\
Each line of a .jsonl file is an object with `prompt`, `prompt_token_ids` or
`messages`, and any other request field. Each nonempty line of any other file
is a prompt.

Exit status: 0 on success, 1 if a prompt failed, 2 for wrong usage, 130 after
Ctrl-C (which cancels on the server too).
"""


def add_command(commands: Any) -> None:
    """Add the command to the subparsers."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "generate",
        help=SUMMARIES["generate"],
        description="Complete a prompt and stream the text, or complete every prompt of a file.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("prompt", nargs="?", help="prompt text; - or nothing reads stdin")
    add_options(parser)
    connection.add_options(parser)
    parser.set_defaults(run=handle_errors(_run))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for prompts, output and sampling to the parser."""
    parser.add_argument("--file", type=Path, metavar="FILE", help="read prompts from a file, one per line")
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write to a file instead of stdout")
    parser.add_argument("--concurrency", type=int, default=64, metavar="N", help="concurrent prompts (default: 64)")
    request_fields.add_options(parser, MAX_TOKENS)


def _run(options: argparse.Namespace) -> int:
    return run_requests(read_requests([] if options.prompt is None else [options.prompt], options), options)


def run_requests(requests: Sequence[pb.GenerateRequest], options: argparse.Namespace) -> int:
    """Send the requests, write the completions and return the exit status."""
    if options.concurrency < 1:
        raise UsageError(f"--concurrency must be at least 1, not {options.concurrency}")
    client = connection.connect(options)
    with Output(options.output) as output, InterruptibleLoop() as loop:
        if options.file or options.json or len(requests) > 1 or requests[0].n > 1:
            return PromptBatch(client, requests, output, options).run(loop)
        return loop.run(_stream(client, requests[0], output))


def read_requests(texts: Sequence[str], options: argparse.Namespace) -> list[pb.GenerateRequest]:
    """Return the requests given by prompt arguments, by `--file`, by `--set` or on stdin."""
    fields = request_fields.from_options(options)
    if options.file:
        if texts:
            raise UsageError("a prompt argument and --file are mutually exclusive")
        _check_output(options.output, options.file)
        return prompts.from_file(options.file, fields)
    if texts and list(texts) != ["-"]:
        return [request_fields.build_request(fields | {"prompt": prompts.from_argument(text)}) for text in texts]
    if not any(name in fields for name in request_fields.PROMPT_FIELDS):
        if not texts and is_terminal(sys.stdin):
            raise UsageError("no prompt: pass one as an argument, with --file or on stdin")
        fields["prompt"] = prompts.from_stdin()
    return [request_fields.build_request(fields)]


def _check_output(output: Path | None, file: Path) -> None:
    if output and output.exists() and file.exists() and output.samefile(file):
        raise UsageError(f"--output would overwrite {file}")


async def _stream(client: AsyncClient, request: pb.GenerateRequest, output: Output) -> int:
    timer = ReplyTimer()
    async with client, client.stream(request) as stream:
        try:
            with Progress("waiting for the first token") as progress:
                async for delta in stream:
                    progress.end()
                    output.write(output.sanitize(delta))
        except (asyncio.CancelledError, YuanError):
            if stream.text:
                output.write("\n")
            raise
        output.write("\n")
        if is_terminal(sys.stderr):
            print_note(timer.format_summary(stream.completion))
    return 0
