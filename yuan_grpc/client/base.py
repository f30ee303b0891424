"""Calls as they are before they are made: RPC, request, deadline and metadata. What both clients share."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from yuan_grpc.client import requests
from yuan_grpc.client.channel import AUTHORIZATION, AuthToken, MetadataLike, Pem, Settings
from yuan_grpc.client.errors import DeadlineError
from yuan_grpc.client.google_rpc import HEALTH_STATUSES, HealthCheckRequest
from yuan_grpc.client.tracing import trace_metadata
from yuan_grpc.client.types import Completion, Gathering

QUICK_SECONDS = 30.0
"""The deadline of a call that does not generate, unless the client's own is shorter."""

LIMITLESS_SECONDS = 1e8
"""Some three years: what is much longer gRPC takes for a time that is over."""

READY_PAUSE_SECONDS = 0.2
"""Between two questions after a server's health, where it has not let itself be watched."""


@dataclass(frozen=True)
class Call:
    """A call to be made. A `timeout` of None is no deadline."""

    rpc: str
    request: Any
    timeout: float | None
    metadata: Sequence[tuple[str, str | bytes]]
    request_id: str = ""


class Caller:
    """A client's settings, and the calls that it makes by them. Each client adds how a call is made."""

    def __init__(
        self,
        target: str = "127.0.0.1:50051",
        *,
        tls: bool | Pem = False,
        client_cert: tuple[Pem, Pem] | None = None,
        token: AuthToken | None = None,
        timeout: float = 600.0,
        retries: int = 4,
        keepalive: float | None = 30.0,
        proxy: str | None = None,
        metadata: MetadataLike = (),
        options: Sequence[tuple[str, object]] = (),
        interceptors: Sequence[Any] = (),
    ) -> None:
        """Checks the arguments and reads the certificates; the connection is made when it is needed.

        Args:
            target: `host:port`, which becomes `dns:///host:port`, or any gRPC target (`dns:`, `ipv4:`, `unix:`). Calls
                go in turn to all addresses that it has.
            tls: True for TLS with the usual authorities; a path or bytes of the authority's certificate for one's own.
            identity: certificate and key, paths or bytes, where the server asks for them (mTLS). Needs `tls`.
            token: is sent with each call as `authorization: Bearer`; a function is asked for it anew each time. Needs
                `tls` unless the target is a loopback address or a unix socket.
            timeout: seconds that a call which generates may take, `math.inf` for no limit; all others have 30, or this
                where it is less. Each call can be given its own.
            retries: how often gRPC tries a call again that was refused as UNAVAILABLE or RESOURCE_EXHAUSTED before its
                first answer; at most 4 count, as gRPC has it. LoadLora, UnloadLora and Abort are not tried again.
            keepalive: seconds after which a connection with calls in flight is probed when nothing comes, from 10, for
                servers take more pings for an attack, to 86,400; None: never.
            proxy: `http://host:port` of a proxy to go through with CONNECT. None: gRPC looks at `grpc_proxy`,
                `https_proxy`, `http_proxy` and their `no_` forms in the environment.
            metadata: is sent with each call; `authorization` in it needs what `token` needs.
            options: of the gRPC channel; they stand above those that this client sets.
            interceptors: gRPC's, for the kind of client that this is.

        Raises:
            ValueError: an argument is outside its range, or some do not go together.
            OSError: a file cannot be read.
        """
        self._closed = True  # until it is open: what follows may raise
        self._settings = Settings(
            target, tls, client_cert, token, timeout, retries, keepalive, proxy, _pairs(metadata), options
        )
        self._interceptors = tuple(interceptors)
        self._credentials = self._settings.credentials()
        self._closed = False
        self._open()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._settings.uri}{', closed' if self._closed else ''}>"

    def _open(self) -> None:
        """Makes what the client needs as soon as it is there."""

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the client is closed")

    def _generation(self, rpc: str, prompt: requests.Prompt, parameters: Mapping[str, Any]) -> Call:
        request = requests.generate_request(prompt, parameters)
        timeout = parameters.get("timeout")
        seconds = self._settings.timeout if timeout is None else timeout
        return self._call(rpc, request, seconds, parameters.get("metadata") or ())

    def _quick(self, rpc: str, request: Any, timeout: float | None) -> Call:
        seconds = min(QUICK_SECONDS, self._settings.timeout) if timeout is None else timeout
        return self._call(rpc, request, seconds, ())

    def _call(self, rpc: str, request: Any, seconds: float, metadata: MetadataLike) -> Call:
        self._check_open()
        name = getattr(request, "request_id", "")
        return Call(rpc, request, deadline(seconds), self._metadata(_pairs(metadata)), name)

    def _metadata(self, own: Sequence[tuple[str, str | bytes]]) -> Sequence[tuple[str, str | bytes]]:
        """The caller's metadata, the call's own first to count, and the trace where neither says another."""
        keys = {key for key, _ in own}
        if AUTHORIZATION in keys:
            self._settings.check_secret(f"`{AUTHORIZATION}` in `metadata`")
        merged = [*own, *(pair for pair in _pairs(self._settings.metadata) if pair[0] not in keys)]
        keys = {key for key, _ in merged}
        merged += [pair for pair in trace_metadata() if pair[0] not in keys]
        if self._settings.token is not None and AUTHORIZATION not in keys:
            token = self._settings.token
            merged.append((AUTHORIZATION, f"Bearer {token if isinstance(token, str) else token()}"))
        return tuple(merged)


class Streaming:
    """A call whose answer comes in parts, and what has come of it."""

    def __init__(self, call: Any, request_id: str) -> None:
        self._call = call
        self._request_id = request_id
        self._gathering = Gathering()
        self._closed = False

    @property
    def text(self) -> str:
        """The first choice's text so far."""
        return self._gathering.text

    @property
    def answer(self) -> Completion:
        """All there is so far, of all choices; whole once the iterator has ended."""
        return self._gathering.answer()

    def close(self) -> None:
        """Cancels the call unless it has ended. The iterator then ends too."""
        self._closed = True
        self._call.cancel()

    @property
    def _name(self) -> str:
        """The request's, the caller's own or as the server told it."""
        return self._request_id or self._gathering.request_id


class Readiness:
    """What is known of a server's health while someone waits for it to serve."""

    def __init__(self, service: str, timeout: float) -> None:
        self.request = HealthCheckRequest(service=service)
        self._timeout = timeout
        self._end = time.monotonic() + timeout
        self._status = ""
        self._refusal: BaseException | None = None

    @property
    def seconds(self) -> float:
        """How many are left; 0 when the time is up."""
        return max(0.0, self._end - time.monotonic())

    @property
    def pause(self) -> float:
        """How many seconds to wait before the server is asked again."""
        return min(READY_PAUSE_SECONDS, self.seconds)

    def saw(self, status: int) -> None:
        """The server has told its health."""
        self._status = HEALTH_STATUSES[status] if 0 <= status < len(HEALTH_STATUSES) else str(status)

    def refused(self, error: Any) -> bool:
        """The server could not be asked, or is gone; returns whether there is sense in asking on."""
        self._refusal = error
        return error.code() in (
            grpc.StatusCode.UNAVAILABLE,
            grpc.StatusCode.CANCELLED,
            grpc.StatusCode.DEADLINE_EXCEEDED,
        )

    def too_late(self) -> DeadlineError:
        """The error of a wait whose time is up."""
        known = f"its health was {self._status}" if self._status else "it has not told its health"
        error = DeadlineError(
            grpc.StatusCode.DEADLINE_EXCEEDED, f"the server was not ready within {self._timeout:g} s: {known}"
        )
        error.__cause__ = self._refusal
        return error


def deadline(seconds: float) -> float | None:
    """Seconds as gRPC takes them, for which None is no limit."""
    return None if seconds >= LIMITLESS_SECONDS else seconds


def checked_many(parameters: Mapping[str, Any], concurrency: int) -> None:
    """Refuses keywords that no request of many can have.

    Raises:
        TypeError: one is unknown.
        ValueError: `concurrency` is below 1, or all requests would have the same name.
    """
    requests.check_keywords(parameters)
    if concurrency < 1:
        raise ValueError(f"`concurrency` must be at least 1, not {concurrency}")
    if parameters.get("request_id"):
        raise ValueError("`request_id` names one call; give each of many its own in a pb.GenerateRequest")


def _pairs(metadata: MetadataLike) -> tuple[tuple[str, str | bytes], ...]:
    pairs = metadata.items() if isinstance(metadata, Mapping) else metadata
    return tuple((key.lower(), value) for key, value in pairs)
