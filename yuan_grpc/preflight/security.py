"""Checks of certificates, keys, tokens, the unix socket, and of ports without TLS."""

import errno
import logging
import os
import socket
import stat
from ipaddress import ip_address
from pathlib import Path

from yuan_grpc.server.security.authentication import Authenticator
from yuan_grpc.server.security.certificates import CertificateError, Certificates, describe_validity
from yuan_grpc.server.settings import Settings
from yuan_grpc.server.settings.security import SecuritySettings
from yuan_grpc.server.start_error import StartError

logger = logging.getLogger(__name__)

MAX_SOCKET_PATH = 107
"""Maximum length of a unix socket's path, in bytes."""


def check(settings: Settings) -> None:
    """Check that the files exist, fit each other and are private, and that no port is in plaintext by accident.

    Raises:
        StartError: the server could not serve, or would be less safe than it looks.
    """
    security = settings.security
    _check_options(security)
    _check_plaintext(settings)
    for flag, file in (("--tls-key-file", security.tls_key_file), ("--token-file", security.token_file)):
        if file is not None:
            _check_private(flag, file)
    _check_certificate(security)
    Authenticator.from_settings(security)
    if settings.grpc.unix_socket is not None:
        _check_socket(settings.grpc.unix_socket)


def _check_options(security: SecuritySettings) -> None:
    if (security.tls_cert_file is None) != (security.tls_key_file is None):
        given, missing = ("cert", "key") if security.tls_cert_file else ("key", "cert")
        raise StartError(f"--tls-{given}-file needs --tls-{missing}-file: TLS takes a certificate and its key")
    if security.tls_client_ca_file and not security.tls_cert_file:
        raise StartError("--tls-client-ca-file needs --tls-cert-file: clients send certificates over TLS only")
    if security.tls_allowed_names and not security.tls_client_ca_file:
        raise StartError("--tls-allowed-names needs --tls-client-ca-file, which requires client certificates")


def _check_plaintext(settings: Settings) -> None:
    security = settings.security
    if security.tls_cert_file or security.allow_plaintext or _is_loopback(settings.host):
        return
    raise StartError(
        f"--host {settings.host} lets other machines connect without TLS: set --tls-cert-file and --tls-key-file, "
        "or --allow-plaintext if a proxy or a mesh encrypts"
    )


def _is_loopback(host: str) -> bool:
    found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return all(ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)


def _check_private(flag: str, file: Path) -> None:
    try:
        mode = file.stat().st_mode
    except OSError as error:
        raise StartError(f"{flag} must be a file that this user can read, not {file}: {error.strerror}") from None
    if mode & stat.S_IROTH:
        raise StartError(
            f"{flag} must not be readable by every user, and {file} is (mode {stat.S_IMODE(mode):04o}): chmod o= {file}"
        )


def _check_certificate(security: SecuritySettings) -> None:
    try:
        if Certificates.from_settings(security) is None:
            return
    except CertificateError as error:
        raise StartError(str(error)) from None
    assert security.tls_cert_file is not None
    if problem := describe_validity(security.tls_cert_file):
        logger.warning("clients will refuse the certificate %s: %s", security.tls_cert_file, problem)


def _check_socket(path: Path) -> None:
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise StartError(f"--unix-socket must be at most {MAX_SOCKET_PATH} bytes long, not {path}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise StartError(f"--unix-socket must be in a folder that this user can write to, not {path.parent}")
    if path.exists() and not path.is_socket():
        raise StartError(f"--unix-socket must be a new path or a socket, and {path} is another file")
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(str(path)) not in (errno.ENOENT, errno.ECONNREFUSED):
            raise StartError(f"the socket {path} is in use: stop the program that listens on it, or choose another one")
