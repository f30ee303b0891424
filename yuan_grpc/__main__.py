"""The `yuan-grpc` command."""

import atexit
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

if sys.argv[1:2] == ["serve"]:
    from yuan_grpc.server import signals

    signals.exit_on_stop_signals()  # also while the modules below are imported
# gRPC reads this when it is imported. Its log on stderr has text of servers, with control characters, and calls the end
# of a listening socket an error.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from yuan_grpc.cli.commands import build_parser, parse, reject_unknown


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the process's exit status."""
    command_arguments, engine_flags = _split_engine_flags(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser(command_arguments)
    options, unknown = parse(parser, command_arguments)
    if unknown and options.command != "serve":
        reject_unknown(parser, options, unknown)
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
