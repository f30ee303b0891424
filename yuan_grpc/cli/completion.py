"""`yuan-grpc completion`: a script that teaches a shell the command's options."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

from yuan_grpc.cli.common.connection import FAILED, at_the_edge
from yuan_grpc.cli.common.terminal import complain

SHELLS = ("bash", "zsh", "fish")
FILES = ("FILE", "CA", "CERT")
FOLDERS = ("FOLDER", "PATH_OR_ID")
"""What options that take a file, or a folder, call their value."""

EPILOG = """\
To have it in every new shell:

  bash  yuan-grpc completion bash > ~/.local/share/bash-completion/completions/yuan-grpc
  zsh   yuan-grpc completion zsh > ~/.zfunc/_yuan-grpc     (with ~/.zfunc in $fpath, before compinit)
  fish  yuan-grpc completion fish > ~/.config/fish/completions/yuan-grpc.fish
"""


def add_command(commands: Any) -> None:
    """Declares the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "completion",
        help="print a script for a shell's completion",
        description="Prints a script that completes this command and its options in a shell.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("shell", choices=SHELLS)
    parser.set_defaults(run=at_the_edge(partial(_run, commands)))


def _run(commands: Any, options: argparse.Namespace) -> int:
    try:
        import shtab
    except ModuleNotFoundError:
        complain("completion needs shtab: install yuan-grpc[cli]")
        return FAILED
    if options.shell not in shtab.SUPPORTED_SHELLS:
        complain(f"this shtab, {shtab.__version__}, does not know {options.shell}: install a newer one")
        return FAILED
    # Made here, for no command is told of the parser that it is part of.
    whole = argparse.ArgumentParser(prog="yuan-grpc")
    whole.add_argument("--version", action="version", help="tell the version")
    whole._add_action(commands)
    for action in _actions(whole):
        names = action.metavar if isinstance(action.metavar, tuple) else (action.metavar,)
        for known, completes in ((FILES, shtab.FILE), (FOLDERS, shtab.DIRECTORY)):
            if any(name in known for name in names):
                action.complete = completes  # type: ignore[attr-defined]  # where shtab looks for it
    print(shtab.complete(whole, shell=options.shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All that the parser and those of its commands take."""
    for action in parser._actions:
        yield action
        below = action.choices if isinstance(action, argparse._SubParsersAction) else {}
        for one in below.values():
            yield from _actions(one)
