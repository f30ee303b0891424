"""The help of `serve`: its own options on one page, and on request those of the engine."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from yuan_grpc.cli.common.install import missing_package
from yuan_grpc.cli.common.terminal import DIM, is_terminal, print_stderr, redirect_to_devnull
from yuan_grpc.server.engine.vllm import env


def add_help_option(parser: argparse.ArgumentParser) -> None:
    """Add a help option that also takes `all`, or a word of the engine's options."""
    parser.add_argument(
        "-h",
        "--help",
        action=_Help,
        nargs="?",
        metavar="WORD",
        help="this page; =all or =WORD: engine options",
    )


class _Help(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, _: argparse.Namespace, word: Any, option: str | None = None
    ) -> None:
        if word is None:
            parser.print_help()
        else:
            _show(_format_engine_help(parser, word))
        parser.exit()


def _format_engine_help(parser: argparse.ArgumentParser, word: str) -> str:
    if is_terminal(sys.stderr):
        print_stderr("importing vLLM to list its options …", DIM)
    try:
        env.set_defaults()
        from yuan_grpc.server.engine.vllm.args import format_help

        return format_help(word)
    except ModuleNotFoundError as error:
        parser.exit(1, f"yuan-grpc: {missing_package(error)}\n")
    except (LookupError, OSError) as error:
        parser.exit(2, f"yuan-grpc: {error}\n")


def _show(text: str) -> None:
    """Print the text, in a pager if stdout is a terminal."""
    from pydoc import pager  # takes time to import

    try:
        pager(text)
        sys.stdout.flush()
    except BrokenPipeError:
        redirect_to_devnull(sys.stdout)
