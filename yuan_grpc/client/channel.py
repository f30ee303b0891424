"""The connection to a server: target, credentials and channel options."""

from __future__ import annotations

import ipaddress
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from yuan_grpc import __version__
from yuan_grpc.v1 import yuan_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["YuanService"].full_name

RETRYABLE_METHODS = ("Generate", "GenerateStream", "Tokenize", "Detokenize", "GetModel", "ListLoras")
"""RPCs without side effects on the server, safe for gRPC to retry."""

AUTHORIZATION = "authorization"
"""Metadata key that holds the token."""

MAX_ATTEMPTS = 5
"""Maximum number of attempts gRPC allows per call."""

MIN_KEEPALIVE, MAX_KEEPALIVE = 10, 86_400
"""Bounds of `keepalive`, in seconds. Servers close connections that ping more often, with all their calls."""

RETRY_BUFFER_BYTES = 8 << 20
"""Maximum size of a request gRPC can retry; its default of 256 KiB is smaller than a long prompt."""

Pem = str | os.PathLike[str] | bytes
MetadataLike = Mapping[str, str | bytes] | Sequence[tuple[str, str | bytes]]
AuthToken = str | Callable[[], str]

_SCHEME = re.compile(r"(dns|ipv4|ipv6|unix|unix-abstract|vsock|xds):")
_HOST_AND_PORT = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]]+):\d+")


@dataclass(frozen=True)
class Settings:
    """The validated arguments of a client; `BaseClient` documents them.

    Raises:
        ValueError: an argument is out of range, or arguments exclude each other.
    """

    target: str
    tls: bool | Pem = False
    client_cert: tuple[Pem, Pem] | None = None
    token: AuthToken | None = None
    timeout: float = 600.0
    retries: int = 4
    keepalive: float | None = 30.0
    proxy: str | None = None
    metadata: MetadataLike = ()
    options: Sequence[tuple[str, object]] = ()

    def __post_init__(self) -> None:
        if not _SCHEME.match(self.target) and not _HOST_AND_PORT.fullmatch(self.target):
            raise ValueError(f"`target` must be host:port or a gRPC target such as dns:///host:port, not {self.target}")
        if not self.timeout > 0:
            raise ValueError(f"`timeout` must be above 0 seconds, not {self.timeout}")
        if self.retries < 0:
            raise ValueError(f"`retries` must be at least 0, not {self.retries}")
        if self.keepalive is not None and not MIN_KEEPALIVE <= self.keepalive <= MAX_KEEPALIVE:
            bounds = f"between {MIN_KEEPALIVE} and {MAX_KEEPALIVE} seconds"
            raise ValueError(f"`keepalive` must be {bounds}, or None to disable it, not {self.keepalive}")
        if self.client_cert is not None and not self.is_secure:
            raise ValueError("`client_cert` needs `tls`: certificates are sent only over TLS")
        if self._has_token:
            self.check_token_is_safe("`token`" if self.token is not None else "`authorization` in `metadata`")

    def check_token_is_safe(self, name: str) -> None:
        """Raise ValueError if a token would leave this machine in plaintext."""
        if not self.is_secure and not (is_local(self.target) and self.proxy is None):
            raise ValueError(
                f"{name} needs `tls`: it would be readable on the way to {self.target}. "
                "Without TLS it is sent only to loopback addresses and unix sockets, and never through a proxy"
            )

    @property
    def _has_token(self) -> bool:
        """Whether every call carries a token, from `token` or from `metadata`."""
        return self.token is not None or any(key.lower() == AUTHORIZATION for key in dict(self.metadata))

    @property
    def is_secure(self) -> bool:
        """Whether the channel uses TLS."""
        return self.tls is not False

    @property
    def uri(self) -> str:
        """The target with its scheme, `dns` by default."""
        return self.target if _SCHEME.match(self.target) else f"dns:///{self.target}"

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
            "grpc.primary_user_agent": f"yuan-grpc/{__version__}",
            "grpc.service_config": service_config(self.retries),
            "grpc.per_rpc_retry_buffer_size": RETRY_BUFFER_BYTES,
            "grpc.max_receive_message_length": -1,
            # Connect within seconds after a server has started; gRPC backs off up to two minutes by default.
            "grpc.initial_reconnect_backoff_ms": 200,
            "grpc.max_reconnect_backoff_ms": 5_000,
        }
        if self.keepalive is not None:
            options["grpc.keepalive_time_ms"] = round(self.keepalive * 1000)
            options["grpc.keepalive_timeout_ms"] = 20_000
            options["grpc.http2.max_pings_without_data"] = 0
        if self.proxy is not None:
            options["grpc.http_proxy"] = self.proxy
        elif not self.is_secure and is_local(self.target):
            options["grpc.enable_http_proxy"] = 0  # a proxy from the environment could read tokens
        return list((options | dict(self.options)).items())


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


def is_local(target: str) -> bool:
    """Return whether a target is on this machine, judged by its address alone."""
    scheme, _, address_list = target.partition(":") if _SCHEME.match(target) else ("dns", ":", target)
    if scheme in ("unix", "unix-abstract"):
        return True
    if scheme not in ("dns", "ipv4", "ipv6"):
        return False
    addresses = address_list.rpartition("/")[2].split(",")
    return all(_is_loopback(re.sub(r":\d+$", "", address).strip("[]")) for address in addresses)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read_pem(source: bool | Pem) -> bytes:
    if isinstance(source, bytes):
        return source
    if isinstance(source, bool):
        raise TypeError("a certificate must be a path or bytes")
    return Path(source).read_bytes()
