"""`yuan-grpc token`: create a token for callers of a server."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

from yuan_grpc.cli.commands import SUMMARIES
from yuan_grpc.cli.common.errors import handle_errors
from yuan_grpc.cli.common.install import missing_package
from yuan_grpc.cli.common.terminal import print_error, print_stderr

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
SCOPES = ("generate", "admin")

EPILOG = """\
The token is printed once; the server keeps its hash. To replace a token, add a
second line of the same name, and remove the first one when no caller uses it.
The server reads a changed file without a restart.
"""


def add_command(commands: Any) -> None:
    """Add the command to the subparsers."""
    parser = commands.add_parser(
        "token",
        help=SUMMARIES["token"],
        description="Create a token, and the line of the server's --token-file for it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", type=_name, help="name of the caller, as in the server's log")
    parser.add_argument(
        "--scope",
        action="append",
        choices=SCOPES,
        help="generate (default), or admin: also LoRA, metrics, reflection, and Abort of others' calls; repeatable",
    )
    parser.add_argument("--file", type=Path, metavar="FILE", help="append the line to FILE (default: to stderr)")
    parser.set_defaults(run=handle_errors(_run))


def _name(text: str) -> str:
    if _NAME.fullmatch(text):
        return text
    raise argparse.ArgumentTypeError(f"must have letters, digits and ._@- only, not {text!r}")


def _run(options: argparse.Namespace) -> int:
    try:
        from yuan_grpc.server.security import tokens
        from yuan_grpc.server.security.identity import Scope
    except ModuleNotFoundError as error:
        print_error(missing_package(error))
        return 1
    token = tokens.create_token()
    scopes = [Scope(scope) for scope in dict.fromkeys(options.scope or ["generate"])]
    line = tokens.format_line(options.name, scopes, token)
    if options.file is None:
        print_stderr(f"line for --token-file: {line}")
    else:
        _append(options.file, line)
    print(token)
    return 0


def _append(file: Path, line: str) -> None:
    """Append a line to a file that only its owner can read if it is new."""
    with os.fdopen(os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600), "r+") as opened:
        contents = opened.read()
        opened.write(("\n" if contents and not contents.endswith("\n") else "") + line + "\n")
