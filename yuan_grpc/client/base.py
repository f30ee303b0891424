"""The code both clients share: arguments, prepared calls, streams, and waiting for readiness."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from yuan_grpc.client import requests
from yuan_grpc.client.channel import MAX_RESPONSE_BYTES, Pem, Settings
from yuan_grpc.client.errors import DeadlineError, InternalError, broken_response_error
from yuan_grpc.client.google_rpc import HEALTH_STATUSES, HealthCheckRequest
from yuan_grpc.client.metadata import AUTHORIZATION, GZIP_REQUEST, AuthToken, MetadataLike, Pairs, bearer, to_pairs
from yuan_grpc.client.tracing import trace_metadata
from yuan_grpc.client.types import Completion, CompletionBuilder

SHORT_TIMEOUT_SECONDS = 30.0
"""Timeout of calls that do not generate, unless the client's own is shorter."""

UNLIMITED_SECONDS = 1e8
"""Shortest timeout that means no deadline, in seconds: three years. gRPC treats much longer ones as already expired."""

READY_POLL_SECONDS = 0.2
"""Delay before watching the server's health again, in seconds."""


@dataclass(frozen=True)
class PreparedCall:
    """An RPC that is ready to send. A `timeout` of None means no deadline."""

    rpc: str
    request: Any
    timeout: float | None
    metadata: Pairs = field(repr=False)
    request_id: str = ""


class BaseClient:
    """A client's settings and the calls prepared from them. Subclasses send the calls."""

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
        max_response_bytes: int = MAX_RESPONSE_BYTES,
        proxy: str | None = None,
        metadata: MetadataLike = (),
        options: Sequence[tuple[str, object]] = (),
        interceptors: Sequence[Any] = (),
        gzip: bool = False,
        connections: int = 8,
    ) -> None:
        """Check the arguments and read the certificates; the client connects on first use.

        Args:
            target: `host:port`, which becomes `dns:///host:port`, or any gRPC target (`dns:`, `ipv4:`, `unix:`). Calls
                are balanced round-robin over all its addresses.
            tls: True for TLS with the system's certificate authorities; a path or bytes for a custom CA certificate.
            client_cert: certificate and key for mTLS, as paths or bytes. Needs `tls`.
            token: sent with each call as `authorization: Bearer`; a function is called for each call. Needs `tls`
                unless the target is a loopback address or a unix socket.
            timeout: timeout of calls that generate, in seconds; `math.inf` for none. Other calls have 30 seconds, or
                this timeout if it is shorter. Each call can override it.
            retries: maximum number of retries by gRPC after UNAVAILABLE or RESOURCE_EXHAUSTED, as long as no response
                has arrived; gRPC allows at most 4. LoadLora, UnloadLora and Abort are never retried.
            keepalive: interval of keepalive pings while calls are in flight, in seconds, from 10 (servers reject more
                frequent pings) to 86,400; None to disable them.
            max_response_bytes: maximum size of a response or of a message of a stream; a larger one fails with
                RESOURCE_EXHAUSTED.
            proxy: `http://host:port` of an HTTP CONNECT proxy. If None, gRPC reads `grpc_proxy`, `https_proxy`,
                `http_proxy` and their `no_` variants from the environment.
            metadata: sent with each call. Entries whose key ends in the word authorization, cookie, credential,
                key, password, secret, session or token have the requirements of `token`.
            options: gRPC channel options; they override those set by this client.
            interceptors: gRPC client interceptors, sync or async like the client.
            gzip: compress requests, and ask the server to compress responses.
            connections: maximum number of connections, 1 to 64. One is opened for every 16 concurrent calls. A
                server with several processes serves each connection by one of them.

        Raises:
            ValueError: an argument is out of range, or arguments exclude each other.
            OSError: a certificate or key file cannot be read.
        """
        self._closed = True  # so that an error below leaves no half-open client
        self._settings = Settings(
            target,
            tls,
            client_cert,
            token,
            timeout,
            retries,
            keepalive,
            max_response_bytes,
            proxy,
            to_pairs(metadata),
            tuple(options),
            gzip,
            connections,
        )
        self._interceptors = tuple(interceptors)
        self._credentials = self._settings.credentials()
        self._closed = False
        self._open()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._settings.uri}{', closed' if self._closed else ''}>"

    def _open(self) -> None:
        """Create the resources needed from the start."""

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the client is closed")

    def _prepare_generation(self, rpc: str, prompt: requests.Prompt, parameters: Mapping[str, Any]) -> PreparedCall:
        request = requests.generate_request(prompt, parameters)
        timeout = parameters.get("timeout")
        seconds = self._settings.timeout if timeout is None else timeout
        return self._prepare(rpc, request, seconds, parameters.get("metadata") or ())

    def _prepare_with_short_timeout(self, rpc: str, request: Any, timeout: float | None) -> PreparedCall:
        seconds = min(SHORT_TIMEOUT_SECONDS, self._settings.timeout) if timeout is None else timeout
        return self._prepare(rpc, request, seconds, ())

    def _prepare(self, rpc: str, request: Any, seconds: float, metadata: MetadataLike) -> PreparedCall:
        self._check_open()
        request_id = getattr(request, "request_id", "")
        return PreparedCall(rpc, request, grpc_timeout(seconds), self._metadata(to_pairs(metadata)), request_id)

    def _metadata(self, call_metadata: Pairs) -> Pairs:
        """Merge the metadata of the call, of the client and of the current trace, in this order of precedence."""
        self._settings.check_metadata_is_safe(call_metadata)
        keys = {key for key, _ in call_metadata}
        merged = [*call_metadata, *(pair for pair in to_pairs(self._settings.metadata) if pair[0] not in keys)]
        keys = {key for key, _ in merged}
        if self._settings.gzip:
            merged.append(GZIP_REQUEST)
        merged += [pair for pair in trace_metadata() if pair[0] not in keys]
        if self._settings.token is not None and AUTHORIZATION not in keys:
            merged.append((AUTHORIZATION, bearer(self._settings.token)))
        return tuple(merged)


class BaseStream:
    """A streaming call and the completion built from its messages."""

    def __init__(self, call: Any, request_id: str) -> None:
        self._call = call
        self._caller_request_id = request_id
        self._builder = CompletionBuilder()
        self._closed = False

    @property
    def text(self) -> str:
        """The first choice's text so far."""
        return self._builder.text

    @property
    def completion(self) -> Completion:
        """The completion so far, with all choices; complete once the iterator is exhausted."""
        return self._builder.build()

    def close(self) -> None:
        """Cancel the call unless it has ended; the iterator then stops."""
        self._closed = True
        self._call.cancel()

    def _add(self, message: Any) -> str:
        """Merge a message and return the text it adds to the first choice; cancel the call if it is broken."""
        try:
            return self._builder.add(check_readable(message, self._request_id))
        except InternalError:
            self.close()
            raise

    def _check_complete(self) -> None:
        """Raise InternalError if the call has succeeded without sending all of its choices."""
        if not self._closed:
            self._builder.check_complete(self._request_id)

    @property
    def _request_id(self) -> str:
        """The request id set by the caller, or else the one received from the server."""
        return self._caller_request_id or self._builder.request_id


class Readiness:
    """The state of waiting for a server to become healthy."""

    def __init__(self, service: str, timeout: float, connect_timeout: float = math.inf) -> None:
        self.request = HealthCheckRequest(service=service)
        self._timeouts = min(connect_timeout, timeout), timeout
        self._started = time.monotonic()
        self._status = ""
        self._error: BaseException | None = None

    @property
    def remaining_seconds(self) -> float:
        """The time left until the deadline; 0 after it."""
        return max(0.0, self._started + self._timeout - time.monotonic())

    @property
    def _timeout(self) -> float:
        """The timeout that applies: the first one until the server has reported a health status, then the second."""
        return self._timeouts[self.has_status]

    @property
    def poll_delay(self) -> float:
        """The delay before watching the server's health again, in seconds."""
        return min(READY_POLL_SECONDS, self.remaining_seconds)

    @property
    def has_status(self) -> bool:
        """Whether the server has reported a health status."""
        return bool(self._status)

    def record_status(self, status: int) -> None:
        """Remember the last health status."""
        self._status = HEALTH_STATUSES[status] if 0 <= status < len(HEALTH_STATUSES) else str(status)

    def record_error(self, error: BaseException) -> None:
        """Remember the error of the last health check."""
        self._error = error

    def timeout_error(self) -> DeadlineError:
        """Return the error to raise once the deadline has passed."""
        status = f"its health was {self._status}" if self.has_status else "no health status was received"
        error = DeadlineError(
            grpc.StatusCode.DEADLINE_EXCEEDED, f"the server was not ready within {self._timeout:g} s: {status}"
        )
        error.__cause__ = self._error
        return error


def is_transient(error: Any) -> bool:
    """Return whether another health check may succeed after this error."""
    return error.code() in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    )


def grpc_timeout(seconds: float) -> float | None:
    """Convert a timeout to gRPC's form, where None means no deadline."""
    return None if seconds >= UNLIMITED_SECONDS else seconds


def check_readable(message: Any, request_id: str) -> Any:
    """Return the message of a successful call.

    gRPC returns None for a missing message; with asyncio, also for a malformed one.

    Raises:
        InternalError: it is missing or malformed.
    """
    if message is None:
        raise broken_response_error("is missing or malformed", request_id)
    return message


def check_many_arguments(parameters: Mapping[str, Any], concurrency: int) -> None:
    """Check the arguments of `generate_many`.

    Raises:
        TypeError: a parameter is unknown.
        ValueError: `concurrency` is below 1, or all requests would share one request id.
    """
    requests.check_parameter_names(parameters)
    if concurrency < 1:
        raise ValueError(f"`concurrency` must be at least 1, not {concurrency}")
    if parameters.get("request_id"):
        raise ValueError("`request_id` must be unique per request; set it in a GenerateRequest for each prompt")
