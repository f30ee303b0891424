"""`yuan-grpc generate`: answers to one prompt, as they are generated, or to many."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from yuan_grpc.cli.common import connection, prompts, request_fields
from yuan_grpc.cli.common.errors import UsageError
from yuan_grpc.cli.common.output import Output
from yuan_grpc.cli.common.progress import Progress
from yuan_grpc.cli.common.signals import Interruptible
from yuan_grpc.cli.common.terminal import DIM, is_terminal, tell
from yuan_grpc.cli.generate_many import Many
from yuan_grpc.client import AsyncClient, Completion, YuanError
from yuan_grpc.v1 import yuan_pb2 as pb

MAX_TOKENS = 256
"""More than the API's 16, which would cut nearly every answer that a person waits for."""

EPILOG = """\
A .jsonl file has an object on each line, with `prompt` or `messages` and any other field of the request; of any other
file each line that is not empty is a prompt.

Exit status: 0; 1 when a prompt failed; 2 when something is wrong with what was asked; 130 after Ctrl-C, which cancels
on the server too.
"""


def add_command(commands: Any) -> None:
    """Declares the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "generate",
        help="continue a prompt, or many",
        description="Continues a prompt, streaming to the terminal, or each prompt of a file.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("prompt", nargs="?", help="the text; - for stdin, which is also read when nothing is given")
    add_options(parser)
    connection.add_options(parser)
    parser.set_defaults(run=connection.at_the_edge(_run))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares what is asked for, and what becomes of answers."""
    parser.add_argument("--file", type=Path, metavar="FILE", help="prompts, one on each line: .jsonl or text")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each answer, not the text alone")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the answers there")
    parser.add_argument("--concurrency", type=int, default=64, metavar="N", help="prompts at a time (default: 64)")
    request_fields.add_options(parser, MAX_TOKENS)


def _run(options: argparse.Namespace) -> int:
    return answer(requests_of([] if options.prompt is None else [options.prompt], options), options)


def answer(requests: Sequence[pb.GenerateRequest], options: argparse.Namespace) -> int:
    """Has a server answer, and writes it down; returns the exit status."""
    if options.concurrency < 1:
        raise UsageError(f"--concurrency must be at least 1, not {options.concurrency}")
    client = connection.connect(options)
    with Output(options.output) as output, Interruptible() as loop:
        if options.file or options.json or len(requests) > 1 or requests[0].n > 1:
            return Many(client, requests, output, options).run(loop)
        return loop.run(_stream(client, requests[0], output))


def requests_of(texts: Sequence[str], options: argparse.Namespace) -> list[pb.GenerateRequest]:
    """What is asked for: by the arguments that are prompts, by `--file`, by `--set`, or on stdin."""
    given = request_fields.of(options)
    if options.file:
        if texts:
            raise UsageError("a prompt and --file do not go together")
        _check_output(options.output, options.file)
        return prompts.from_file(options.file, given)
    if texts and list(texts) != ["-"]:
        return [request_fields.request_of(given | {"prompt": prompts.argument(text)}) for text in texts]
    if not any(name in given for name in request_fields.PROMPTS):
        if not texts and is_terminal(sys.stdin):
            raise UsageError("a prompt, --file, or something on stdin is needed")
        given["prompt"] = prompts.standard_input()
    return [request_fields.request_of(given)]


def _check_output(output: Path | None, file: Path) -> None:
    if output and output.exists() and file.exists() and output.samefile(file):
        raise UsageError(f"--output would overwrite {file}")


async def _stream(client: AsyncClient, request: pb.GenerateRequest, output: Output) -> int:
    began = time.monotonic()
    async with client, client.stream(request) as stream:
        try:
            with Progress("waiting for the first token") as waiting:
                async for delta in stream:
                    waiting.end()
                    output.write(output.shown(delta))
        except (asyncio.CancelledError, YuanError):
            if stream.text:
                output.write("\n")
            raise
        output.write("\n")
        if is_terminal(sys.stderr):
            tell(ending(stream.answer, time.monotonic() - began), DIM)
    return 0


def ending(answer: Completion, seconds: float) -> str:
    """Why an answer ended, how long it is, and how fast it came."""
    reason = answer.choices[0].finish_reason if answer.choices else None
    tokens = answer.usage.completion_tokens
    return f"[{reason}, {tokens} tokens, {tokens / max(seconds, 1e-9):.1f} tokens/s]"
