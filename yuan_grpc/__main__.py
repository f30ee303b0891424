"""The `yuan-grpc` command."""

import argparse
import atexit
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from yuan_grpc.server import signals

if sys.argv[1:2] == ["serve"]:
    signals.exit_on_stop_signals()  # also while the modules below are imported
# gRPC reads this when it is imported. Its log on stderr has text of servers, with control characters, and calls the end
# of a listening socket an error.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from yuan_grpc import __version__
from yuan_grpc.cli import bench, chat, completion, generate, run, serve
from yuan_grpc.cli.common.suggestions import suggestion

COMMANDS = [
    serve.add_command,
    generate.add_command,
    chat.add_command,
    bench.add_command,
    run.add_command,
    completion.add_command,
]
try:
    from yuan_grpc.cli import humaneval
except ModuleNotFoundError as error:
    if error.name not in ("fcntl", "resource"):  # missing on Windows
        raise
else:
    COMMANDS.insert(-2, humaneval.add_commands)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the process's exit status."""
    parser = argparse.ArgumentParser(prog="yuan-grpc", description="Serve and call Yuan 2.0 models over gRPC.")
    parser.add_argument(
        "--version", action="version", version=f"yuan-grpc {__version__}", help="show the version and exit"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add_command in COMMANDS:
        add_command(commands)
    command_arguments, engine_flags = _split_engine_flags(sys.argv[1:] if arguments is None else arguments)
    options, unknown = parser.parse_known_args(command_arguments)
    if unknown and options.command != "serve":
        command = commands.choices[options.command]
        hint = suggestion(unknown[0], command._option_string_actions) if unknown[0].startswith("--") else ""
        command.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    if options.command in ("serve", "run"):
        options.engine_flags = [*unknown, *engine_flags]
    status: int = options.run(options)
    if arguments is None and "vllm" in sys.modules:
        _exit_at_once(status)
    return status


def _exit_at_once(status: int) -> NoReturn:
    """End the process as usual, but without Python's cleanup of all objects, which takes a second after vLLM."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _split_engine_flags(arguments: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Return the command's arguments and, for `run`, the vLLM flags after `--`."""
    if arguments and arguments[0] == "run" and "--" in arguments:
        separator = arguments.index("--")
        return arguments[:separator], arguments[separator + 1 :]
    return arguments, ()


if __name__ == "__main__":
    sys.exit(main())
