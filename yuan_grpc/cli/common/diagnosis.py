"""The reason why no server answers, found with a connection of its own.

gRPC reports the error of one of its attempts, and of TLS in OpenSSL's words.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from yuan_grpc.client.target import is_local, to_uri

SECONDS = 3.0
"""Maximum time of a step: a connection, a handshake or an answer."""

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""The first bytes of an HTTP/2 client: the preface, and an empty SETTINGS frame."""

_SETTINGS = 4
"""Type of the frame that an HTTP/2 server sends first."""
_PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")

Address = tuple[int, Any]
"""A socket's family and address."""


def find_cause(
    target: str, tls: bool | Path = False, *, identity: Sequence[Path] | None = None, proxy: str | None = None
) -> str | None:
    """Return why no gRPC server answers at the target and what to do; None if one does, or if it cannot be found out.

    Args:
        target: an address or a gRPC target.
        tls: whether the caller uses TLS; a path is the file of the CA.
        identity: the files of the caller's certificate and key.
        proxy: the proxy that the caller uses; nothing is sent through it.
    """
    if proxy or (not is_local(target) and any(os.environ.get(name) for name in _PROXY_VARIABLES)):
        return None
    scheme, _, rest = to_uri(target).partition(":")
    if scheme == "unix":
        return _diagnose([(socket.AF_UNIX, rest.removeprefix("//"))], target, "", tls, identity)
    host, _, port = rest.removeprefix("///").split(",")[0].rpartition(":")
    if scheme not in ("dns", "ipv4", "ipv6") or host.startswith("//") or not port.isdecimal():
        return None
    host = host.strip("[]")
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except (OSError, OverflowError, UnicodeError):
        return f"the name {host} is unknown: check --address or YUAN_GRPC_ADDRESS"
    return _diagnose([(family, address) for family, _, _, _, address in found], target, host, tls, identity)


def _diagnose(
    addresses: list[Address], target: str, host: str, tls: bool | Path, identity: Sequence[Path] | None
) -> str | None:
    errors = []
    for address in addresses:
        try:
            _connect(address).close()
        except OSError as error:
            errors.append(error)
        else:
            return _diagnose_tls(address, target, host, tls, identity) if tls else _diagnose_plaintext(address, target)
    return _describe_connection_errors(errors, target)


def _describe_connection_errors(errors: list[OSError], target: str) -> str:
    if any(isinstance(error, ConnectionRefusedError | FileNotFoundError) for error in errors):
        return (
            f"nothing listens on {target}: start a server with `yuan-grpc serve`, "
            "or name another with --address or YUAN_GRPC_ADDRESS"
        )
    reason = "it does not answer" if isinstance(errors[0], TimeoutError) else errors[0].strerror or str(errors[0])
    return f"{target} cannot be reached ({reason}): check --address, the network and firewalls"


def _diagnose_plaintext(address: Address, target: str) -> str | None:
    answer = _first_bytes(address)
    if _is_http2(answer):
        return None
    if _accepts_tls(address):
        return f"the server at {target} uses TLS: add --tls, or --tls CA with the file of its certificate authority"
    return _describe_answer(answer, target)


def _describe_answer(answer: bytes | None, target: str) -> str:
    if answer is None:
        return f"{target} accepts connections, but does not answer: a gRPC server would within {SECONDS:g} seconds"
    if answer.startswith((b"HTTP/1", b"<")):
        return f"{target} is an HTTP server, not a gRPC server: --address needs the gRPC port (default: 50051)"
    if not answer:
        return f"{target} accepts connections and closes them: it is not a gRPC server, or a proxy without one"
    return f"{target} is not a gRPC server: its first bytes are {answer[:20]!r}"


def _diagnose_tls(
    address: Address, target: str, host: str, tls: bool | Path, identity: Sequence[Path] | None
) -> str | None:
    try:
        context = ssl.create_default_context(cafile=None if tls is True else str(tls))
        context.set_alpn_protocols(["h2"])
        if identity:
            context.load_cert_chain(identity[0], identity[1])
        with _connect(address) as plain, context.wrap_socket(plain, server_hostname=host or "localhost") as secure:
            if secure.selected_alpn_protocol() != "h2":
                return f"the server at {target} uses TLS, but not gRPC: --address needs the gRPC port"
            secure.sendall(PREFACE)
            return None if _is_http2(secure.recv(64)) else _describe_closed(target)
    except ssl.SSLCertVerificationError as error:
        return _describe_certificate(error, target)
    except (OSError, ValueError) as error:
        return _describe_tls_error(error, address, target)


def _describe_closed(target: str) -> str:
    return f"the server at {target} ends the connection after the TLS handshake: it may require --identity CERT KEY"


def _describe_certificate(error: ssl.SSLCertVerificationError, target: str) -> str:
    reason = error.verify_message.rstrip(".")
    if "mismatch" in reason:
        return f"the certificate of the server at {target} has another name ({reason}): use its name in --address"
    return f"the certificate of the server at {target} is not trusted ({reason}): name its CA with --tls CA"


def _describe_tls_error(error: Exception, address: Address, target: str) -> str | None:
    if _is_http2(_first_bytes(address)):
        return f"the server at {target} does not use TLS: remove --tls"
    if isinstance(error, ssl.SSLError) and "alert" in str(error).lower():
        return _describe_closed(target)
    return f"{target} is not a gRPC server with TLS"


def _connect(address: Address) -> socket.socket:
    family, location = address
    connection = socket.socket(family, socket.SOCK_STREAM)
    connection.settimeout(SECONDS)
    try:
        connection.connect(location)
    except BaseException:
        connection.close()
        raise
    return connection


def _first_bytes(address: Address) -> bytes | None:
    """Return the first bytes that a server answers an HTTP/2 client; None if it is silent."""
    try:
        with _connect(address) as connection:
            connection.sendall(PREFACE)
            return connection.recv(64)
    except TimeoutError:
        return None
    except OSError:
        return b""


def _is_http2(answer: bytes | None) -> bool:
    return answer is not None and len(answer) >= 9 and answer[3] == _SETTINGS and answer[5:9] == bytes(4)


def _accepts_tls(address: Address) -> bool:
    """Return whether the server answers a TLS handshake, whatever its certificate."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with _connect(address) as plain, context.wrap_socket(plain):
            return True
    except ssl.SSLError as error:
        return "alert" in str(error).lower()  # only a TLS server sends one
    except OSError:
        return False
