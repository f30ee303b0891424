"""The command `yuan-grpc`."""

import argparse
import sys
from collections.abc import Sequence

from yuan_grpc import __version__
from yuan_grpc.cli import bench, chat, completion, generate, run, serve

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
except ModuleNotFoundError as missing:
    if missing.name not in ("fcntl", "resource"):  # which Windows has not
        raise
else:
    COMMANDS.insert(-2, humaneval.add_commands)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the process's exit status."""
    parser = argparse.ArgumentParser(prog="yuan-grpc", description="Yuan 2.0 over gRPC, on vLLM.")
    parser.add_argument("--version", action="version", version=f"yuan-grpc {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(commands)
    own, engine_flags = _split(sys.argv[1:] if arguments is None else arguments)
    chosen, others = parser.parse_known_args(own)
    if others and chosen.command != "serve":
        commands.choices[chosen.command].error(f"unrecognized arguments: {' '.join(others)}")
    if chosen.command in ("serve", "run"):
        chosen.engine_flags = [*others, *engine_flags]
    status: int = chosen.run(chosen)
    return status


def _split(arguments: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """The command's own arguments, and those that stand behind `--` of `run`, which are vLLM's."""
    if arguments and arguments[0] == "run" and "--" in arguments:
        end = arguments.index("--")
        return arguments[:end], arguments[end + 1 :]
    return arguments, ()


if __name__ == "__main__":
    sys.exit(main())
