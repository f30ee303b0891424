"""`yuan-grpc probe`: a health check for Docker, and for exec probes of Kubernetes."""

from __future__ import annotations

import argparse
import os
from typing import Any

from yuan_grpc.cli.commands import SUMMARIES
from yuan_grpc.cli.common import connection
from yuan_grpc.cli.common.errors import EXIT_FAILURE, UsageError, handle_errors
from yuan_grpc.cli.common.terminal import print_error

STATUSES = {0: "UNKNOWN", 1: "SERVING", 2: "NOT_SERVING", 3: "SERVICE_UNKNOWN"}
SERVING = 1

EPILOG = """\
Services of a yuan-grpc server:
  readiness  SERVING while the server accepts calls (the default)
  liveness   SERVING unless the engine is stalled
  startup    SERVING once the model has been loaded

Exit status: 0 if the service is SERVING, else 1; 2 for wrong usage.
"""


def add_command(commands: Any) -> None:
    """Add the command to the subparsers."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "probe",
        help=SUMMARIES["probe"],
        description="Check the health of a server.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("service", nargs="?", default="readiness", metavar="SERVICE", help="see below")
    connection.add_channel_options(parser, _default_address())
    parser.add_argument(
        "--timeout", type=connection.positive_seconds, default=5.0, metavar="S", help="seconds to wait (default: 5)"
    )
    parser.set_defaults(run=_run)


def _default_address() -> str:
    """Return the address of a server in the same container, which reads its port from the same environment."""
    return f"127.0.0.1:{os.environ.get('YUAN_GRPC_PORT') or connection.ADDRESS.rpartition(':')[2]}"


@handle_errors
def _run(options: argparse.Namespace) -> int:
    import grpc

    try:
        status = _check(options)
    except grpc.RpcError as error:
        print_error(f"{options.address} does not answer: {error.code().name}")
        return EXIT_FAILURE
    print(status)
    return 0 if status == STATUSES[SERVING] else EXIT_FAILURE


def _check(options: argparse.Namespace) -> str:
    """Return the status of the service.

    Raises:
        UsageError: an option is invalid, or options conflict.
        grpc.RpcError: the server does not answer, or does not know the service.
    """
    import grpc

    from yuan_grpc.client.channel import Settings

    identity = tuple(options.identity) if options.identity else None
    try:
        settings = Settings(options.address, tls=options.tls, client_cert=identity)
        credentials, channel_options = settings.credentials(), settings.channel_options()
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from None
    channel = (
        grpc.secure_channel(settings.uri, credentials, channel_options)
        if credentials
        else grpc.insecure_channel(settings.uri, channel_options)
    )
    with channel:
        # The messages have one field each; their stubs are in a package that only servers have.
        check = channel.unary_unary("/grpc.health.v1.Health/Check", _serialize, _deserialize)
        status: int = check(options.service, timeout=options.timeout)
    return STATUSES.get(status, str(status))


def _serialize(service: str) -> bytes:
    """Return a `HealthCheckRequest`."""
    raw = service.encode()[:127]
    return bytes([0x0A, len(raw)]) + raw


def _deserialize(raw: bytes) -> int:
    """Return the status in a `HealthCheckResponse`."""
    return raw[1] if raw[:1] == b"\x08" and len(raw) > 1 else 0
