"""The connection to a server: target, credentials and channel options."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc

import yuan_grpc
from yuan_grpc.client.connections import MAX_CONNECTIONS
from yuan_grpc.client.metadata import AuthToken, MetadataLike, bearer, is_secret, to_pairs
from yuan_grpc.client.target import is_local, is_valid, to_uri
from yuan_grpc.v1 import yuan_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["YuanService"].full_name

RETRYABLE_METHODS = ("Generate", "GenerateStream", "Tokenize", "Detokenize", "GetModel", "GetLoads", "ListLoras")
"""RPCs without side effects on the server, safe for gRPC to retry."""

MAX_ATTEMPTS = 5
"""Maximum number of attempts gRPC allows per call."""

MIN_KEEPALIVE, MAX_KEEPALIVE = 10, 86_400
"""Bounds of `keepalive`, in seconds. Servers close connections that ping more often, with all their calls."""

RETRY_BUFFER_BYTES = 4 << 20
"""Maximum size of a request gRPC can retry. Its default of 256 KiB is smaller than a long prompt. Servers reject
requests above 4 MiB. gRPC would otherwise retry these as if the server were overloaded, because both cases return
RESOURCE_EXHAUSTED."""

MAX_RESPONSE_BYTES = 64 << 20
"""Default of `max_response_bytes`. The largest response, with 2^20 log-probabilities, has about 30 MB."""

MAX_MESSAGE_BYTES = 2**31 - 1
"""Maximum size of a gRPC message."""

_RECEIVE_LIMIT, _SEND_LIMIT = "grpc.max_receive_message_length", "grpc.max_send_message_length"

Pem = str | os.PathLike[str] | bytes


@dataclass(frozen=True)
class Settings:
    """The validated arguments of a client; `BaseClient` documents them.

    Raises:
        ValueError: an argument is out of range, or arguments exclude each other.
    """

    target: str
    tls: bool | Pem = False
    client_cert: tuple[Pem, Pem] | None = field(default=None, repr=False)
    token: AuthToken | None = field(default=None, repr=False)
    timeout: float = 600.0
    retries: int = 4
    keepalive: float | None = 30.0
    max_response_bytes: int = MAX_RESPONSE_BYTES
    proxy: str | None = field(default=None, repr=False)
    metadata: MetadataLike = field(default=(), repr=False)
    options: Sequence[tuple[str, object]] = field(default=(), repr=False)
    gzip: bool = False
    connections: int = 8

    def __post_init__(self) -> None:
        if not is_valid(self.target):
            raise ValueError(f"`target` must be host:port or a gRPC target such as dns:///host:port, not {self.target}")
        if not self.timeout > 0:
            raise ValueError(f"`timeout` must be above 0 seconds, not {self.timeout}")
        if self.retries < 0:
            raise ValueError(f"`retries` must be at least 0, not {self.retries}")
        if self.keepalive is not None and not MIN_KEEPALIVE <= self.keepalive <= MAX_KEEPALIVE:
            bounds = f"between {MIN_KEEPALIVE} and {MAX_KEEPALIVE} seconds"
            raise ValueError(f"`keepalive` must be {bounds}, or None to disable it, not {self.keepalive}")
        if not 1 <= self.max_response_bytes <= MAX_MESSAGE_BYTES:
            bounds = f"between 1 and {MAX_MESSAGE_BYTES}"
            raise ValueError(f"`max_response_bytes` must be {bounds}, not {self.max_response_bytes}")
        if not 1 <= self.connections <= MAX_CONNECTIONS:
            raise ValueError(f"`connections` must be between 1 and {MAX_CONNECTIONS}, not {self.connections}")
        if self.client_cert is not None and not self.is_secure:
            raise ValueError("`client_cert` needs `tls`: certificates are sent only over TLS")
        if self.token is not None:
            self._check_secret_is_safe("`token`")
            if isinstance(self.token, str):
                bearer(self.token)
        self.check_metadata_is_safe(self.metadata)

    def check_metadata_is_safe(self, metadata: MetadataLike) -> None:
        """Raise ValueError if a secret would leave this machine in plaintext."""
        for key, _ in to_pairs(metadata):
            if is_secret(key):
                self._check_secret_is_safe(f"`{key}` in `metadata`")

    def _check_secret_is_safe(self, name: str) -> None:
        if not self.is_secure and not (is_local(self.target) and not self._has_proxy):
            raise ValueError(
                f"{name} needs `tls`: it would be readable on the way to {self.target}. "
                "Without TLS it is sent only to loopback addresses and unix sockets, and never through a proxy"
            )

    @property
    def _has_proxy(self) -> bool:
        """Whether `proxy` or a channel option configures a proxy."""
        return self.proxy is not None or any("http_proxy" in name and value for name, value in self.options)

    @property
    def is_secure(self) -> bool:
        """Whether the channel uses TLS."""
        return self.tls is not False

    @property
    def uri(self) -> str:
        """The target with its scheme, `dns` by default."""
        return to_uri(self.target)

    def credentials(self) -> grpc.ChannelCredentials | None:
        """Return the credentials of a TLS channel; None for plaintext.

        Raises:
            OSError: a certificate or key file cannot be read.
        """
        if not self.is_secure:
            return None
        authority = None if self.tls is True else _read_pem(self.tls)
        certificate, key = map(_read_pem, self.client_cert) if self.client_cert is not None else (None, None)
        return grpc.ssl_channel_credentials(authority, key, certificate)

    def channel_options(self) -> list[tuple[str, object]]:
        """Return the default options overridden by the caller's."""
        options: dict[str, object] = {
            "grpc.primary_user_agent": f"yuan-grpc/{yuan_grpc.__version__}",
            "grpc.service_config": service_config(self.retries),
            "grpc.use_local_subchannel_pool": 1,  # otherwise channels to one target share a connection
            "grpc.per_rpc_retry_buffer_size": self._retry_buffer_bytes,
            _RECEIVE_LIMIT: self.max_response_bytes,
            # Connect within seconds after a server has started; gRPC backs off up to two minutes by default.
            "grpc.initial_reconnect_backoff_ms": 200,
            "grpc.max_reconnect_backoff_ms": 5_000,
        }
        if self.keepalive is not None:
            options["grpc.keepalive_time_ms"] = round(self.keepalive * 1000)
            options["grpc.keepalive_timeout_ms"] = 20_000
            options["grpc.http2.max_pings_without_data"] = 0
        if self.gzip:
            options["grpc.default_compression_algorithm"] = grpc.Compression.Gzip.value
        if self.proxy is not None:
            options["grpc.http_proxy"] = self.proxy
        elif not self.is_secure and is_local(self.target):
            options["grpc.enable_http_proxy"] = 0  # a proxy from the environment could read tokens
        return list((options | dict(self.options)).items())

    @property
    def _retry_buffer_bytes(self) -> int:
        """The retry buffer. Requests above the server's or the caller's send limit are not retried."""
        send_limit = dict(self.options).get(_SEND_LIMIT)
        return (
            min(RETRY_BUFFER_BYTES, send_limit)
            if isinstance(send_limit, int) and send_limit > 0
            else RETRY_BUFFER_BYTES
        )


def service_config(retries: int) -> str:
    """Return gRPC's service config: round-robin load balancing, and retries of the methods that are safe to retry.

    gRPC retries a call only before its first response, honors the server's `grpc-retry-pushback-ms`, and keeps within
    the call's deadline.
    """
    config: dict[str, object] = {"loadBalancingConfig": [{"round_robin": {}}]}
    if retries:
        policy = {
            "maxAttempts": min(retries + 1, MAX_ATTEMPTS),
            "initialBackoff": "0.25s",
            "maxBackoff": "5s",
            "backoffMultiplier": 2,
            "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
        }
        names = [{"service": SERVICE, "method": method} for method in RETRYABLE_METHODS]
        config["methodConfig"] = [{"name": names, "retryPolicy": policy}]
    return json.dumps(config)


def _read_pem(source: bool | Pem) -> bytes:
    if isinstance(source, bytes):
        return source
    if isinstance(source, bool):
        raise TypeError("a certificate must be a path or bytes")
    with open(source, "rb") as file:
        return file.read()
