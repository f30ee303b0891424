"""`yuan-grpc completion`: a shell completion script."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

from yuan_grpc.cli.commands import SUMMARIES
from yuan_grpc.cli.common.errors import EXIT_FAILURE, handle_errors
from yuan_grpc.cli.common.terminal import print_error

SHELLS = ("bash", "zsh", "fish")
FILE_METAVARS = ("FILE", "CA", "CERT")
FOLDER_METAVARS = ("FOLDER", "PATH_OR_ID")
"""Metavars of options whose value completes to a file, or to a folder."""

EPILOG = """\
To install it for every new shell:

bash:
  yuan-grpc completion bash \\
    > ~/.local/share/bash-completion/completions/yuan-grpc
zsh, with ~/.zfunc in $fpath before compinit:
  yuan-grpc completion zsh > ~/.zfunc/_yuan-grpc
fish:
  yuan-grpc completion fish > ~/.config/fish/completions/yuan-grpc.fish
"""


def add_command(commands: Any) -> None:
    """Add the command to the subparsers."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "completion",
        help=SUMMARIES["completion"],
        description="Print a script that completes the commands and their options in a shell.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("shell", choices=SHELLS, help="shell to print the script for")
    parser.set_defaults(run=handle_errors(partial(_run, commands)))


def _run(commands: Any, options: argparse.Namespace) -> int:
    try:
        import shtab
    except ModuleNotFoundError:
        print_error("completion requires shtab: install yuan-grpc[cli]")
        return EXIT_FAILURE
    if options.shell not in shtab.SUPPORTED_SHELLS:
        print_error(f"shtab {shtab.__version__} does not support {options.shell}: install a newer version")
        return EXIT_FAILURE
    # Commands have no reference to the root parser, so build one with the same subparsers.
    root = argparse.ArgumentParser(prog="yuan-grpc")
    root.add_argument("--version", action="version", help="show the version and exit")
    root._add_action(commands)
    for action in _walk_actions(root):
        metavars = action.metavar if isinstance(action.metavar, tuple) else (action.metavar,)
        for candidates, completer in ((FILE_METAVARS, shtab.FILE), (FOLDER_METAVARS, shtab.DIRECTORY)):
            if any(metavar in candidates for metavar in metavars):
                action.complete = completer  # type: ignore[attr-defined]  # read by shtab
    print(shtab.complete(root, shell=options.shell))
    return 0


def _walk_actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the actions of the parser and of all its subparsers."""
    for action in parser._actions:
        yield action
        subparsers = action.choices if isinstance(action, argparse._SubParsersAction) else {}
        for subparser in subparsers.values():
            yield from _walk_actions(subparser)
