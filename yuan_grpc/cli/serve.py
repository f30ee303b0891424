"""`yuan-grpc serve`: serve a model over gRPC."""

import argparse
import asyncio
import logging
import os
import sys
from dataclasses import replace
from typing import Any, NoReturn

from yuan_grpc.cli.commands import SUMMARIES
from yuan_grpc.cli.common.engine_help import add_help_option
from yuan_grpc.cli.common.install import missing_package
from yuan_grpc.cli.common.suggestions import suggestion
from yuan_grpc.server import log_format, log_queue, settings, signals
from yuan_grpc.server.engine.vllm import env, openmp
from yuan_grpc.server.settings import Settings
from yuan_grpc.server.start_error import StartError
from yuan_grpc.vllm_check import vllm_imports_checked

logger = logging.getLogger(__name__)

EXIT_FAILURE, EXIT_USAGE = 1, 2

CPUS_EACH, MAX_DEFAULT = 4, 8
"""Number of CPUs for each front end, and maximum number of front ends, without `--frontends`."""


class _Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line, like any other cause that keeps the server from starting."""

    def error(self, message: str) -> NoReturn:
        hint = "" if message.endswith("?") else "; see yuan-grpc serve --help"
        self.exit(EXIT_USAGE, f"yuan-grpc: cannot start: {message}{hint}\n")


def add_command(commands: Any) -> None:
    """Add the command to the subparsers. Its options are declared in `settings`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "serve", help=SUMMARIES["serve"], allow_abbrev=False, add_help=False
    )
    parser.__class__ = _Parser
    add_help_option(parser)
    settings.add_options(parser, os.environ)
    parser.set_defaults(run=_run, check_flags=lambda engine_flags: _check_flags(parser, engine_flags))


def _check_flags(parser: argparse.ArgumentParser, engine_flags: list[str]) -> None:
    """Report a flag that neither the server nor vLLM has."""
    from yuan_grpc.preflight import flags

    known = {*flags.vllm_flags(), *parser._option_string_actions}
    for flag in flags.unknown_flags(engine_flags):
        parser.error(f"unrecognized option {flag}{suggestion(flag, known)}")


def _run(options: argparse.Namespace) -> int:
    from yuan_grpc.preflight import machine

    signals.exit_on_stop_signals()
    options.check_flags(options.engine_flags)
    if machine.is_cpu_build():
        openmp.restart_with_library("serve")
    config = settings.read(options, options.engine_flags)
    signals.exit_on_stop_signals(config.telemetry.log_format)
    log_queue.configure(config.log_level, config.telemetry.log_format)
    if config.log_level != "debug":
        logging.getLogger("vllm").setLevel(logging.WARNING)  # until vLLM has read `engine_log.json`
    os.umask(env.OWN_UMASK)
    try:
        with vllm_imports_checked():
            return _serve(config)
    except StartError as error:
        cause = str(error)
    except ModuleNotFoundError as error:
        cause = missing_package(error)
    except (OSError, ValueError) as error:
        cause = str(error)
    line = log_format.format_line(config.telemetry.log_format, "ERROR", f"yuan-grpc: cannot start: {cause}")
    print(line, end="", file=sys.stderr)
    return EXIT_FAILURE


def _serve(config: Settings) -> int:
    from yuan_grpc import preflight

    env.set_defaults(config.log_level, config.telemetry.log_format)
    count = config.frontends or default_front_ends()
    preflight.check(replace(config, frontends=count))
    import uvloop

    from yuan_grpc.server import server

    if config.telemetry.log_format == "text":
        print(server.startup_banner(config), end="", file=sys.stderr, flush=True)
    logger.info("importing vLLM")
    from yuan_grpc.server.engine.vllm import warm_fork

    if count > 1:
        return _serve_with_front_ends(config, count)
    from yuan_grpc.server.engine.vllm.args import parse_engine_flags
    from yuan_grpc.server.engine.vllm.engine import VllmEngine

    warm_fork.start()
    engine = VllmEngine(parse_engine_flags(config.vllm_flags), config.lora_folder, owns_process=True)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(server.serve(config, engine))


def _serve_with_front_ends(config: Settings, count: int) -> int:
    from yuan_grpc.server.engine.vllm import warm_fork
    from yuan_grpc.server.engine.vllm.args import parse_engine_flags

    env.share_metrics()
    warm_fork.start(warm_fork.FRONT_END)
    from yuan_grpc.server.frontends import supervisor

    options = parse_engine_flags(config.vllm_flags)
    with asyncio.Runner() as runner:
        return runner.run(supervisor.serve(config, options, count))


def default_front_ends() -> int:
    """Return the number of front ends: a quarter of the CPUs with a GPU; 1 if the engine itself uses the CPUs."""
    from yuan_grpc.preflight import machine

    return 1 if machine.is_cpu_build() else max(1, min(MAX_DEFAULT, len(os.sched_getaffinity(0)) // CPUS_EACH))
