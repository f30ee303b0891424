"""The way to a server: target, credentials, and the channel's options."""

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

REPEATABLE = ("Generate", "GenerateStream", "Tokenize", "Detokenize", "GetModel", "ListLoras")
"""The RPCs that change nothing on the server, so that gRPC may send them again."""

AUTHORIZATION = "authorization"
"""The metadata that has a token."""

MAX_ATTEMPTS = 5
"""gRPC's own limit."""

LEAST_KEEPALIVE, MOST_KEEPALIVE = 10, 86_400
"""Seconds: who probes more often loses all calls, cut off by the server for too many pings; and a day."""

RETRY_BUFFER_BYTES = 8 << 20
"""A request that does not fit is not sent again; gRPC's own 256 KiB are less than a long prompt."""

Pem = str | os.PathLike[str] | bytes
MetadataLike = Mapping[str, str | bytes] | Sequence[tuple[str, str | bytes]]
AuthToken = str | Callable[[], str]

_SCHEME = re.compile(r"(dns|ipv4|ipv6|unix|unix-abstract|vsock|xds):")
_HOST_AND_PORT = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]]+):\d+")


@dataclass(frozen=True)
class Settings:
    """What a client was told; see `Client` for the meaning of each.

    Raises:
        ValueError: one is outside its range, or some do not go together.
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
        if self.keepalive is not None and not LEAST_KEEPALIVE <= self.keepalive <= MOST_KEEPALIVE:
            span = f"between {LEAST_KEEPALIVE} and {MOST_KEEPALIVE} seconds"
            raise ValueError(f"`keepalive` must be {span}, or None for none, not {self.keepalive}")
        if self.client_cert is not None and not self.is_secure:
            raise ValueError("`client_cert` needs `tls`: a certificate is shown over TLS only")
        if self._has_secret:
            self.check_secret("`token`" if self.token is not None else "`authorization` in `metadata`")

    def check_secret(self, name: str) -> None:
        """Raises ValueError where something secret would be sent so that others could read it."""
        if not self.is_secure and not (is_local(self.target) and self.proxy is None):
            raise ValueError(
                f"{name} needs `tls`: in plain text to {self.target} whoever is on the way could read it. "
                "Without TLS it goes to loopback addresses and unix sockets only, and through no proxy"
            )

    @property
    def _has_secret(self) -> bool:
        """Whether a token goes with each call, as such or as metadata."""
        return self.token is not None or any(key.lower() == AUTHORIZATION for key in dict(self.metadata))

    @property
    def is_secure(self) -> bool:
        """Whether the channel uses TLS."""
        return self.tls is not False

    @property
    def uri(self) -> str:
        """The target with its scheme: DNS unless it has another."""
        return self.target if _SCHEME.match(self.target) else f"dns:///{self.target}"

    def credentials(self) -> grpc.ChannelCredentials | None:
        """For a TLS channel; None for plain text.

        Raises:
            OSError: a file of theirs cannot be read.
        """
        if not self.is_secure:
            return None
        authority = None if self.tls is True else _pem(self.tls)
        certificate, key = map(_pem, self.client_cert) if self.client_cert is not None else (None, None)
        return grpc.ssl_channel_credentials(authority, key, certificate)

    def channel_options(self) -> list[tuple[str, object]]:
        """Our options, and over them the caller's."""
        chosen: dict[str, object] = {
            "grpc.primary_user_agent": f"yuan-grpc/{__version__}",
            "grpc.service_config": service_config(self.retries),
            "grpc.per_rpc_retry_buffer_size": RETRY_BUFFER_BYTES,
            "grpc.max_receive_message_length": -1,
            # A server that is being started is found within seconds of its being there, not within gRPC's two minutes.
            "grpc.initial_reconnect_backoff_ms": 200,
            "grpc.max_reconnect_backoff_ms": 5_000,
        }
        if self.keepalive is not None:
            chosen["grpc.keepalive_time_ms"] = round(self.keepalive * 1000)
            chosen["grpc.keepalive_timeout_ms"] = 20_000
            chosen["grpc.http2.max_pings_without_data"] = 0
        if self.proxy is not None:
            chosen["grpc.http_proxy"] = self.proxy
        elif not self.is_secure and is_local(self.target):
            chosen["grpc.enable_http_proxy"] = 0  # one out of the environment would read a token, also a call's own
        return list((chosen | dict(self.options)).items())


def service_config(retries: int) -> str:
    """gRPC's service config: calls go to all of a name's addresses in turn, and are tried again where that is safe.

    gRPC tries again only before a call's first answer, waits as long as a server's `grpc-retry-pushback-ms` says, and
    keeps to the call's deadline.
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
        names = [{"service": SERVICE, "method": method} for method in REPEATABLE]
        config["methodConfig"] = [{"name": names, "retryPolicy": policy}]
    return json.dumps(config)


def is_local(target: str) -> bool:
    """Whether what is sent to a target does not leave this machine, as far as its name tells."""
    scheme, _, rest = target.partition(":") if _SCHEME.match(target) else ("dns", ":", target)
    if scheme in ("unix", "unix-abstract"):
        return True
    if scheme not in ("dns", "ipv4", "ipv6"):
        return False
    addresses = rest.rpartition("/")[2].split(",")
    return all(_is_loopback(re.sub(r":\d+$", "", address).strip("[]")) for address in addresses)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _pem(source: bool | Pem) -> bytes:
    if isinstance(source, bytes):
        return source
    if isinstance(source, bool):
        raise TypeError("a certificate must be a path or bytes")
    return Path(source).read_bytes()
