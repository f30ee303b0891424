"""Options that can also be set in the environment."""

import argparse
from collections.abc import Callable, Mapping

PREFIX = "YUAN_GRPC_"

_BOOLEANS = {"": False, "0": False, "false": False, "no": False, "1": True, "true": True, "yes": True}


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


def add_switch(parser: argparse._ActionsContainer, environment: Mapping[str, str], flag: str, text: str) -> None:
    """Add an option that is true if it is given without a value, or if its environment variable says so."""
    variable = PREFIX + flag.removeprefix("--").replace("-", "_").upper()

    def parse_value(value: str) -> bool:
        if value.lower() in _BOOLEANS:
            return _BOOLEANS[value.lower()]
        source = f"environment variable {variable}: " if isinstance(value, _EnvironmentValue) else ""
        raise argparse.ArgumentTypeError(f"{source}must be true or false, not {value!r}")

    default = _EnvironmentValue(environment.get(variable, "false"))
    parser.add_argument(flag, nargs="?", const=True, default=default, type=parse_value, metavar="BOOL", help=text)
