"""Connection options of the client commands, and the client they configure."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

from yuan_grpc.cli.common.errors import UsageError
from yuan_grpc.cli.common.terminal import is_terminal, print_stderr
from yuan_grpc.client import AsyncClient
from yuan_grpc.client.metadata import AuthToken

ADDRESS = "127.0.0.1:50051"

LOCAL_ENGINE: dict[str, Any] = {
    "tls": False,
    "identity": None,
    "token": None,
    "token_file": None,
    "timeout": math.inf,
    "retries": 0,
    "proxy": None,
    "metadata": [],
}
"""Connection options for an engine in the same process."""

_METADATA_KEY = re.compile(r"[a-z0-9_.-]+")
_PROXY_URL = re.compile(r"http://[!-~]+:\d+/?")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the connection options to the parser."""
    group = parser.add_argument_group("connection")
    add_channel_options(group, ADDRESS)
    group.add_argument("--token", help="bearer token (env: YUAN_GRPC_TOKEN, hidden from ps)")
    group.add_argument("--token-file", type=_file, metavar="FILE", help="file with the token, read for each call")
    group.add_argument(
        "--timeout", type=positive_seconds, default=600.0, metavar="S", help="seconds per call, or inf (default: 600)"
    )
    group.add_argument(
        "--retries", type=int, default=4, metavar="N", help="retries of a refused call, at most 4 (default: 4)"
    )
    group.add_argument("--proxy", type=_proxy, metavar="URL", help="HTTP proxy, as http://host:port")
    group.add_argument(
        "--metadata",
        action="append",
        default=[],
        type=_metadata,
        metavar="KEY=VALUE",
        help="metadata sent with each call; repeatable",
    )


def add_channel_options(parser: argparse._ActionsContainer, address: str) -> None:
    """Add the options for the address, with a default, and for TLS."""
    parser.add_argument(
        "--address",
        default=os.environ.get("YUAN_GRPC_ADDRESS") or address,
        metavar="HOST:PORT",
        help=f"server address or gRPC target (env: YUAN_GRPC_ADDRESS; default: {address})",
    )
    parser.add_argument(
        "--tls",
        nargs="?",
        const=True,
        default=False,
        type=_file,
        metavar="CA",
        help="use TLS; CA: certificate file (default: system CAs)",
    )
    parser.add_argument("--tls-ca-file", dest="tls", type=_file, metavar="CA", help="the same as --tls CA")
    parser.add_argument(
        "--identity", nargs=2, type=_file, metavar=("CERT", "KEY"), help="client certificate and key for mutual TLS"
    )


def connect(options: argparse.Namespace, *interceptors: Any) -> AsyncClient:
    """Return a client configured by the options and with the given gRPC interceptors.

    Raises:
        UsageError: an option is invalid, or options conflict.
    """
    token = choose_token(options.token, options.token_file)
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


def choose_token(option: str | None, file: Path | None = None) -> AuthToken | None:
    """Return the token of the option, the file or the environment; at a terminal, warn that an option is visible.

    Raises:
        UsageError: the token cannot be sent, or there are two.
    """
    if option and file:
        raise UsageError("--token and --token-file exclude each other")
    if file:
        return partial(_read_token, file)
    if option and is_terminal(sys.stderr):
        print_stderr("warning: --token is visible in `ps`; use --token-file, or YUAN_GRPC_TOKEN in the environment")
    token = option or os.environ.get("YUAN_GRPC_TOKEN") or None
    if token and not _is_printable_ascii(token):
        raise UsageError("the token must be printable ASCII")
    return token


def _read_token(file: Path) -> str:
    """Return the token in a file, which may be replaced while a command runs."""
    try:
        token = file.read_text(errors="replace").strip()
    except OSError as error:
        raise UsageError(f"--token-file must be a file that this user can read, not {file}: {error.strerror}") from None
    if not token or not _is_printable_ascii(token):
        raise UsageError(f"{file} must have one line of printable ASCII, the token")
    return token


def positive_seconds(text: str) -> float:
    """Parse an option's value as a number of seconds above 0; `inf` is allowed."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if seconds > 0:
        return seconds
    raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, not {text!r}")


def _file(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"no such file: {text!r} (put the prompt before the options or after --)")
    return Path(text)


def _proxy(text: str) -> str:
    if not _PROXY_URL.fullmatch(text):
        without_password = re.sub(r"(?<=//)[^/]*@", "…@", text)
        raise argparse.ArgumentTypeError(f"must be http://host:port, not {without_password!r}")
    return text


def _metadata(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    key = key.lower()
    if not equals or not _METADATA_KEY.fullmatch(key):
        # Without the text: its value may be a secret.
        raise argparse.ArgumentTypeError("must be KEY=VALUE with a key of letters, digits, '_', '.' and '-'")
    if key.startswith("grpc-"):
        raise argparse.ArgumentTypeError(f"the key must not begin with 'grpc-', which gRPC reserves, not {key}")
    if key.endswith("-bin"):
        raise argparse.ArgumentTypeError(f"the key must not end with '-bin', which gRPC uses for bytes, not {key}")
    if not _is_printable_ascii(value):
        raise argparse.ArgumentTypeError(f"the value of {key} must be printable ASCII")
    return key, value


def _is_printable_ascii(text: str) -> bool:
    return text.isascii() and text.isprintable()
