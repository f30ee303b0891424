"""Command line errors: exit statuses and messages on stderr."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import grpc

from yuan_grpc.cli.common.terminal import Notes, print_error, print_stderr, redirect_to_devnull, sanitize_line, use_utf8
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
        Notes.quiet = getattr(options, "quiet", False)
        try:
            return _run_and_report_call(command, options)
        except UsageError as error:
            print_error(str(error))
            return EXIT_USAGE
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


def _run_and_report_call(command: Command, options: argparse.Namespace) -> int:
    try:
        return command(options)
    except YuanError as error:
        print_failed_call(error, options)
        return EXIT_FAILURE


def print_failed_call(error: YuanError, options: argparse.Namespace) -> None:
    """Print the error of a call as `print_call_error` does, or the reason why the call reached no server."""
    if cause := find_connection_cause(error, options):
        print_error(f"{error.code.name}: {cause}")
    else:
        print_call_error(error)


def is_unreachable(error: YuanError) -> bool:
    """Return whether gRPC itself reports that a server is not available, in its own words and those of OpenSSL."""
    return error.code is grpc.StatusCode.UNAVAILABLE and not error.reason


def find_connection_cause(error: YuanError, options: argparse.Namespace) -> str | None:
    """Return why a call reached no Yuan server; None if it reached one, or if the reason is in the error.

    Takes seconds if the server is silent.
    """
    if error.reason or options.command == "run":  # only servers give reasons; `run` has its own
        return None
    if error.code is grpc.StatusCode.UNIMPLEMENTED:
        return f"the gRPC server at {options.address} has no yuan.v1.YuanService: {error.message}"
    if error.code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED) or "GOAWAY" in error.message:
        return None  # a server that sends GOAWAY says why
    from yuan_grpc.cli.common.diagnosis import find_cause

    cause = find_cause(options.address, options.tls, identity=options.identity, proxy=options.proxy)
    if cause is None and error.code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"no response from {options.address} within {options.timeout:g} seconds (--timeout)"
    return cause


def print_call_error(error: YuanError, prefix: str = "") -> None:
    """Print the error of a call to stderr. If several fields are invalid, print one more line for each."""
    # Only the server's log explains an internal error, and it is searched by request id.
    request = f" (request {error.request_id})" if isinstance(error, InternalError) and error.request_id else ""
    print_error(f"{prefix}{error.code.name}: {error.message}{request}")
    if len(error.violations) > 1:
        for violation in error.violations:
            print_stderr("  " + sanitize_line(f"{violation.field}: {violation.description}"))
