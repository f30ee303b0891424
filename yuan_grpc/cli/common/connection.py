"""The way to a server, as options that all client commands have; and what is said when it leads nowhere."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from yuan_grpc.cli.common.errors import UsageError
from yuan_grpc.cli.common.terminal import complain, hush, is_terminal, tell, use_utf8, visible
from yuan_grpc.client import AsyncClient, YuanError

ADDRESS = "127.0.0.1:50051"
FAILED, MISUSED, INTERRUPTED, UNREAD = 1, 2, 130, 141
"""Exit statuses: something failed; it was asked for wrongly; Ctrl-C; nobody read on (128 + SIGPIPE's number)."""

PRIVATE: dict[str, Any] = {
    "tls": False,
    "identity": None,
    "token": None,
    "timeout": math.inf,
    "retries": 0,
    "proxy": None,
    "metadata": [],
}
"""The options of a connection to an engine of one's own."""

Run = Callable[[argparse.Namespace], int]

_KEY = re.compile(r"[a-z0-9_.-]+")
_PROXY = re.compile(r"http://[!-~]+:\d+/?")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    group = parser.add_argument_group("connection")
    group.add_argument(
        "--address",
        default=os.environ.get("YUAN_GRPC_ADDRESS") or ADDRESS,
        metavar="HOST:PORT",
        help=f"the server, or any gRPC target (YUAN_GRPC_ADDRESS; default: {ADDRESS})",
    )
    group.add_argument(
        "--tls", nargs="?", const=True, default=False, type=_file, metavar="CA", help="use TLS, with a CA of your own"
    )
    group.add_argument(
        "--identity", nargs=2, type=_file, metavar=("CERT", "KEY"), help="certificate and key, where the server asks"
    )
    group.add_argument("--token", help="bearer token; better in YUAN_GRPC_TOKEN, for others see a flag in `ps`")
    group.add_argument(
        "--timeout", type=seconds_above_0, default=600.0, metavar="S", help="of each call; inf for none (600)"
    )
    group.add_argument("--retries", type=int, default=4, metavar="N", help="of calls that were not begun (default: 4)")
    group.add_argument("--proxy", type=_proxy, metavar="URL", help="http://host:port to go through")
    group.add_argument(
        "--metadata", action="append", default=[], type=_pair, metavar="KEY=VALUE", help="to send with each call"
    )


def connect(options: argparse.Namespace, *interceptors: Any) -> AsyncClient:
    """The client that the options ask for, with gRPC's interceptors.

    Raises:
        UsageError: they do not go together, or a certificate is none.
    """
    if options.token and is_terminal(sys.stderr):
        tell("A token on the command line can be seen in `ps`; YUAN_GRPC_TOKEN in the environment cannot.")
    token = options.token or os.environ.get("YUAN_GRPC_TOKEN") or None
    if token and not _is_plain(token):
        raise UsageError("the token must be printable ASCII")
    try:
        return AsyncClient(
            options.address,
            tls=options.tls,
            client_cert=tuple(options.identity) if options.identity else None,
            token=token,
            timeout=options.timeout,
            retries=options.retries,
            proxy=options.proxy,
            metadata=options.metadata,
            interceptors=interceptors,
        )
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from None


def at_the_edge(run: Run) -> Run:
    """The command as a process runs it: what goes wrong becomes a sentence and an exit status."""

    def guarded(options: argparse.Namespace) -> int:
        use_utf8()
        try:
            return run(options)
        except UsageError as error:
            complain(str(error))
            return MISUSED
        except YuanError as error:
            tell_error(error)
            suggest(error, options.address)
            return FAILED
        except KeyboardInterrupt:
            complain("cancelled")
            return INTERRUPTED
        except BrokenPipeError:
            hush(sys.stdout)
            return UNREAD
        except OSError as error:
            complain(str(error))
            return FAILED

    return guarded


def tell_error(error: YuanError, subject: str = "") -> None:
    """Writes an error to stderr: a line, and below it what is wrong with each field, where there are several."""
    complain(f"{subject}{error.code.name}: {error.message}")
    if len(error.violations) > 1:
        for violation in error.violations:
            tell(visible(f"  {violation.field}: {violation.description}"))


def suggest(error: YuanError, address: str) -> None:
    """Writes what could be tried, where no server was found: then gRPC says UNAVAILABLE, and gives no reason."""
    if error.code is grpc.StatusCode.UNAVAILABLE and not error.reason:
        tell(f"Nothing answers on {address}. `yuan-grpc serve` or `make serve` starts a server there; --address names")
        tell("another, or YUAN_GRPC_ADDRESS.")


def seconds_above_0(text: str) -> float:
    """The value of an option that is a time; `inf` is one."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if seconds > 0:
        return seconds
    raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, not {text!r}")


def _file(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text!r} (a prompt goes before the options, or behind --)")
    return Path(text)


def _proxy(text: str) -> str:
    if not _PROXY.fullmatch(text):
        raise argparse.ArgumentTypeError(f"must be http://host:port, not {text!r}")
    return text


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    key = key.lower()
    if not equals or not _KEY.fullmatch(key) or key.endswith("-bin") or key.startswith("grpc-"):
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, the key of letters, digits, '_', '.', '-', not {text!r}")
    if not _is_plain(value):
        raise argparse.ArgumentTypeError(f"the value of {key} must be printable ASCII")
    return key, value


def _is_plain(text: str) -> bool:
    """Whether gRPC takes it as the value of metadata."""
    return text.isascii() and text.isprintable()
