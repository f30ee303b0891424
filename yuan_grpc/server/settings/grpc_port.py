"""Settings of the gRPC port: its unix socket, and limits on connections and messages."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from yuan_grpc.server.settings import parsers as parse
from yuan_grpc.server.settings.environment import add_option

MAX_MESSAGE_BYTES = 2**31 - 1
"""Maximum size of a gRPC message."""


@dataclass(frozen=True)
class GrpcSettings:
    """Settings of the gRPC port.

    Attributes:
        unix_socket: a socket to listen on in addition to the port; None for none.
        max_request_bytes: maximum size of a request, or of a message of a batch; also of an HTTP body.
        max_response_bytes: maximum size of a response, or of a message of a stream.
        max_concurrent_streams: maximum running calls of one connection; the client holds the others back.
        max_connection_age: age at which a connection takes no more calls, in seconds, plus or minus 10 %; None for no
            limit.
        max_connection_age_grace: time for the calls of such a connection to finish, in seconds; None for no limit.
    """

    unix_socket: Path | None = None
    max_request_bytes: int = 4 << 20
    max_response_bytes: int = 64 << 20
    max_concurrent_streams: int = 8192
    max_connection_age: float | None = None
    max_connection_age_grace: float | None = None


def add_options(parser: argparse.ArgumentParser, environment: Mapping[str, str]) -> None:
    """Add the options to a parser, in a group."""
    group = parser.add_argument_group("limits of the gRPC port")
    add: Callable[..., None] = partial(add_option, group, environment)
    add("--unix-socket", "", parse.optional_file, "PATH", "serve this unix socket too")
    add("--max-request-bytes", "4M", parse.byte_size, "SIZE", "size of a request or body (default: 4M)")
    add("--max-response-bytes", "64M", parse.byte_size, "SIZE", "size of a response (default: 64M)")
    add("--max-concurrent-streams", "8192", parse.count, "N", "calls of a connection (default: 8192)")
    add("--max-connection-age", "", parse.optional_positive_seconds, "S", "until clients reconnect (default: no limit)")
    add(
        "--max-connection-age-grace",
        "",
        parse.optional_positive_seconds,
        "S",
        "for its calls to finish (default: no limit)",
    )


def read(options: argparse.Namespace) -> GrpcSettings:
    """Return the settings from parsed options."""
    return GrpcSettings(
        unix_socket=options.unix_socket,
        max_request_bytes=options.max_request_bytes,
        max_response_bytes=options.max_response_bytes,
        max_concurrent_streams=options.max_concurrent_streams,
        max_connection_age=options.max_connection_age,
        max_connection_age_grace=options.max_connection_age_grace,
    )
