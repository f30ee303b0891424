"""Options that can also be set in the environment."""

import argparse
from collections.abc import Callable, Mapping

PREFIX = "YUAN_GRPC_"


class _EnvironmentValue(str):
    """An option value that comes from an environment variable."""


def add_option(
    parser: argparse._ActionsContainer,
    environment: Mapping[str, str],
    flag: str,
    default: str,
    parse: Callable[[str], object],
    metavar: str,
    text: str,
) -> None:
    """Add an option whose default comes from an environment variable, if it is set."""
    variable = PREFIX + flag.removeprefix("--").replace("-", "_").upper()

    def parse_value(value: str) -> object:
        try:
            return parse(value)
        except argparse.ArgumentTypeError as error:
            if isinstance(value, _EnvironmentValue):
                raise argparse.ArgumentTypeError(f"environment variable {variable}: {error}") from None
            raise

    from_environment = environment.get(variable)
    value = default if from_environment is None else _EnvironmentValue(from_environment)
    parser.add_argument(flag, default=value, type=parse_value, metavar=metavar, help=text)
