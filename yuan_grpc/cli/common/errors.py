"""Command line errors: exit statuses and messages on stderr."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import grpc

from yuan_grpc.cli.common.terminal import print_error, print_stderr, redirect_to_devnull, sanitize_line, use_utf8
from yuan_grpc.client import InternalError, YuanError

EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 1, 2, 130, 141
"""Exit statuses: a failed call, wrong usage, Ctrl-C (128 + SIGINT) and a closed output pipe (128 + SIGPIPE)."""

Command = Callable[[argparse.Namespace], int]


class UsageError(ValueError):
    """Command line input that a command rejects before it sends a request. The text gives the reason."""


def handle_errors(command: Command) -> Command:
    """Wrap a command so that an exception becomes a message on stderr and an exit status."""

    def wrapper(options: argparse.Namespace) -> int:
        use_utf8()
        try:
            return command(options)
        except UsageError as error:
            print_error(str(error))
            return EXIT_USAGE
        except YuanError as error:
            print_call_error(error)
            print_connection_hint(error, options.address)
            return EXIT_FAILURE
        except KeyboardInterrupt:
            print_error("cancelled")
            return EXIT_INTERRUPTED
        except BrokenPipeError:
            redirect_to_devnull(sys.stdout)
            return EXIT_BROKEN_PIPE
        except OSError as error:
            print_error(str(error))
            return EXIT_FAILURE

    return wrapper


def print_call_error(error: YuanError, prefix: str = "") -> None:
    """Print the error of a call to stderr. If several fields are invalid, print one more line for each."""
    # Only the server's log explains an internal error, and it is searched by request id.
    request = f" (request {error.request_id})" if isinstance(error, InternalError) and error.request_id else ""
    print_error(f"{prefix}{error.code.name}: {error.message}{request}")
    if len(error.violations) > 1:
        for violation in error.violations:
            print_stderr("  " + sanitize_line(f"{violation.field}: {violation.description}"))


def print_connection_hint(error: YuanError, address: str) -> None:
    """Print how to reach a server if the call reached none. gRPC then reports UNAVAILABLE without a reason."""
    if error.code is grpc.StatusCode.UNAVAILABLE and not error.reason:
        print_stderr(f"No server is reachable at {address}. Start one with `yuan-grpc serve` or `make serve`,")
        print_stderr("or name another with --address or YUAN_GRPC_ADDRESS.")
