"""Settings of a stop and of the stall watchdog."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from yuan_grpc.server.settings import parsers as parse
from yuan_grpc.server.settings.environment import add_option


@dataclass(frozen=True)
class LifecycleSettings:
    """Settings of a stop and of the stall watchdog.

    Attributes:
        withdraw_seconds: time after a stop signal in which new calls are still served, in seconds.
        stall_seconds: time without progress of the engine after which it counts as stalled, in seconds; 0 for never.
        stall_exit_seconds: time of a stall after which the server exits, in seconds; None for never.
    """

    withdraw_seconds: float = 0
    stall_seconds: float = 60
    stall_exit_seconds: float | None = None


def add_options(parser: argparse.ArgumentParser, environment: Mapping[str, str]) -> None:
    """Add the options to a parser."""
    add = partial(add_option, parser.add_argument_group("at SIGTERM, and when the engine stalls"), environment)
    add("--grace-seconds", "30", parse.seconds, "S", "for running calls to finish (default: 30)")
    add("--withdraw-seconds", "0", parse.seconds, "S", "before it, to accept new calls (default: 0)")
    add("--stall-seconds", "60", parse.seconds, "S", "without progress; 0: never (default: 60)")
    add("--stall-exit-seconds", "", parse.optional_seconds, "S", "time from then to an exit (default: never)")


def read(options: argparse.Namespace) -> LifecycleSettings:
    """Return the settings from parsed options."""
    return LifecycleSettings(
        withdraw_seconds=options.withdraw_seconds,
        stall_seconds=options.stall_seconds,
        stall_exit_seconds=options.stall_exit_seconds,
    )
