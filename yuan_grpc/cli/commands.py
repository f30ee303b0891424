"""The commands, and the parser that imports only the module of the command that is run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from yuan_grpc.cli.common.suggestions import suggestion

SUMMARIES = {
    "serve": "serve a model over gRPC",
    "probe": "check the health of a server",
    "generate": "complete one prompt, or every prompt of a file",
    "chat": "chat with the model",
    "bench": "measure throughput and latency under load",
    "humaneval": "measure a model on HumanEval",
    "run": "load a model and complete prompts, without a server",
    "quantize": "write a checkpoint with smaller weights",
    "token": "create a token for callers of a server",
    "completion": "print a shell completion script",
}
"""Each command, which has a module of its name, and its line in the help of `yuan-grpc`."""

if not (find_spec("fcntl") and find_spec("resource")):  # missing on Windows
    del SUMMARIES["humaneval"]

QUIET = ("generate", "chat", "bench", "humaneval", "run")
"""Commands with notes and progress on stderr, which `--quiet` turns off."""


class _Formatter(argparse.HelpFormatter):
    """Help with one line for each command, however long its name."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog)
        self._action_max_length = 4 + max(map(len, SUMMARIES))  # argparse ignores that commands are indented


class _Version(argparse.Action):
    """Print the version, which takes time to read, only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from yuan_grpc import __version__

        print(f"yuan-grpc {__version__}")
        parser.exit()


def build_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser of `yuan-grpc`. Only the command in the arguments has its options.

    The parser of `completion` has the options of all commands, which its script completes.
    """
    parser = argparse.ArgumentParser(
        prog="yuan-grpc", description="Serve and call Yuan 2.0 models over gRPC.", formatter_class=_Formatter
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    name = next((argument for argument in arguments if not argument.startswith("-")), None)
    for command, summary in SUMMARIES.items():
        if name in (command, "completion"):
            import_module(f"yuan_grpc.cli.{command}").add_command(subparsers)
            if command in QUIET:
                _add_quiet(subparsers.choices[command])
        else:
            subparsers.add_parser(command, help=summary)
    if not arguments:
        parser.print_help(sys.stderr)
        parser.exit(2)
    if name and name not in SUMMARIES:
        parser.error(f"unknown command {name!r}{suggestion(name, SUMMARIES)}")
    return parser


def _subparsers(parser: argparse.ArgumentParser) -> argparse._SubParsersAction[argparse.ArgumentParser] | None:
    """Return the commands below a parser, if it has any."""
    return next((action for action in parser._actions if isinstance(action, argparse._SubParsersAction)), None)


def _add_quiet(parser: argparse.ArgumentParser) -> None:
    """Add `--quiet` to a command, or to the commands below it."""
    commands = _subparsers(parser)
    if commands and commands.required:
        for name in commands.choices:
            _add_quiet(commands.choices[name])
        return
    parser.add_argument("-q", "--quiet", action="store_true", help="print no notes and no progress, only errors")


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options, and the unknown arguments.

    argparse takes the value of an unknown option for the name of an optional subcommand, so one that is not called is
    removed first.
    """
    commands = _subparsers(parser)
    assert commands is not None
    for command in commands.choices.values():
        optional = _subparsers(command)
        if optional and not optional.required and not {"-h", "--help", *optional.choices}.intersection(arguments):
            command._remove_action(optional)
    return parser.parse_known_args(arguments)


def reject_unknown(parser: argparse.ArgumentParser, options: argparse.Namespace, unknown: Sequence[str]) -> None:
    """Exit with an error that names the unknown arguments, and the command's option most similar to the first one."""
    while commands := _subparsers(parser):
        name = getattr(options, commands.dest)
        if name is None:
            break
        parser = commands.choices[name]
    mistyped = next((argument for argument in unknown if argument.startswith("--")), "")
    hint = suggestion(mistyped, parser._option_string_actions)
    parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
