"""The certificate of the server and the authorities of its clients, read again when their files change."""

import logging
import os
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any, NoReturn

import grpc

from yuan_grpc.server.security.files import file_version
from yuan_grpc.server.settings.security import SecuritySettings

logger = logging.getLogger(__name__)


class CertificateError(ValueError):
    """A certificate or key that cannot be used. The text names the option and what to do."""


@dataclass(frozen=True, eq=False)
class Material:
    """The contents of the files at one time, which fit each other.

    Attributes:
        context: the context of TLS over HTTP. It asks for a client certificate, but accepts none: probes have none.
    """

    certificate: bytes
    key: bytes
    authorities: bytes | None
    context: ssl.SSLContext

    def grpc_configuration(self) -> grpc.ServerCertificateConfiguration:
        """Return the files in gRPC's form."""
        return grpc.ssl_server_certificate_configuration([(self.key, self.certificate)], self.authorities)


class Certificates:
    """The files of TLS. Connections that are open keep the certificate with which they began.

    While the files do not fit each other, as during their replacement, the last ones that did stay in use.

    Raises:
        CertificateError: a file cannot be read or used.
    """

    def __init__(self, certificate: Path, key: Path, authorities: Path | None = None) -> None:
        self._files = (certificate, key, authorities)
        self._lock = Lock()  # gRPC reads in a thread of its own
        self._versions = self._read_versions()
        self._material = read_material(certificate, key, authorities)

    @classmethod
    def from_settings(cls, settings: SecuritySettings) -> "Certificates | None":
        """Return the certificates of the settings; None for plaintext."""
        if settings.tls_cert_file is None or settings.tls_key_file is None:
            return None
        return cls(settings.tls_cert_file, settings.tls_key_file, settings.tls_client_ca_file)

    @property
    def verifies_clients(self) -> bool:
        """Whether clients need a certificate."""
        return self._files[2] is not None

    def current(self) -> Material:
        """Return the contents of the files, which are read only if they have changed."""
        with self._lock:
            if (changed := self._read_versions()) != self._versions:
                self._versions = changed
                self._read_again()
            return self._material

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """Return credentials that read the files again at each handshake, if they have changed."""
        used = self.current()

        def fetch() -> Any:
            nonlocal used
            if (material := self.current()) is used:
                return None  # unchanged; the stubs of grpcio do not know it
            used = material
            return material.grpc_configuration()

        return grpc.dynamic_ssl_server_credentials(used.grpc_configuration(), fetch, self.verifies_clients)

    def _read_again(self) -> None:
        try:
            self._material = read_material(*self._files)
        except CertificateError as error:
            logger.error("%s; the certificate from before stays in use", error)
        else:
            logger.info("read the certificate again: %s", describe_validity(self._files[0]) or "valid")

    def _read_versions(self) -> Sequence[object]:
        return [file_version(file) for file in self._files if file is not None]


def read_material(certificate: Path, key: Path, authorities: Path | None) -> Material:
    """Read the files.

    Raises:
        CertificateError: a file cannot be read or used, or the files do not fit each other.
    """
    contents = _read_all(certificate, key, authorities)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    _load_pair(context, certificate, key)
    if authorities is not None:
        _load_authorities(context, authorities, contents[2] or b"")
    if _read_all(certificate, key, authorities) != contents:
        raise CertificateError("the files of TLS changed while they were read")
    return Material(*contents, context)


def _read_all(certificate: Path, key: Path, authorities: Path | None) -> tuple[bytes, bytes, bytes | None]:
    return (
        _read("--tls-cert-file", certificate),
        _read("--tls-key-file", key),
        None if authorities is None else _read("--tls-client-ca-file", authorities),
    )


def _read(flag: str, file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise CertificateError(f"{flag} must be a file that this user can read, not {file}: {error.strerror}") from None


def _load_pair(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    def refuse_password() -> NoReturn:
        raise CertificateError(f"--tls-key-file must be a key without a password, not {key}")

    try:
        context.load_cert_chain(certificate, key, refuse_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise CertificateError(f"--tls-key-file must be the key of {certificate}, and {key} is another's") from None
        flag, file = ("--tls-key-file", key) if _has_certificate(certificate) else ("--tls-cert-file", certificate)
        raise CertificateError(f"{flag} must be a PEM file of a {_noun(flag)}, and {file} is not") from None


def _noun(flag: str) -> str:
    return "key" if flag == "--tls-key-file" else "certificate"


def _has_certificate(file: Path) -> bool:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=file.read_text("ascii"))
    except (ssl.SSLError, ValueError, OSError):
        return False
    return True


def _load_authorities(context: ssl.SSLContext, file: Path, contents: bytes) -> None:
    try:
        context.load_verify_locations(cadata=contents.decode("ascii"))
    except (ssl.SSLError, ValueError):
        raise CertificateError(f"--tls-client-ca-file must be a PEM file of certificates, and {file} is not") from None
    context.verify_mode = ssl.CERT_OPTIONAL


def certificate_names(certificate: Mapping[str, Any] | None) -> list[str]:
    """Return the alternative names of a client certificate as `ssl` describes it, or else its common name."""
    if not certificate:
        return []
    alternatives = [str(value) for _, value in certificate.get("subjectAltName", ())]
    subject = {key: str(value) for pairs in certificate.get("subject", ()) for key, value in pairs}
    return alternatives or [subject[name] for name in ("commonName",) if name in subject]


def describe_validity(file: Path) -> str:
    """Return why a certificate is not valid now; empty if it is, or if that is unknown."""
    decode: Any = getattr(getattr(ssl, "_ssl", None), "_test_decode_cert", None)  # the only decoder without a handshake
    if decode is None:
        return ""
    try:
        fields = decode(os.fspath(file))
    except (ssl.SSLError, OSError):
        return ""
    return _describe_period(fields, datetime.now(UTC).timestamp())


def _describe_period(fields: dict[str, Any], now: float) -> str:
    if ssl.cert_time_to_seconds(fields["notAfter"]) < now:
        return f"it expired on {fields['notAfter']}"
    if ssl.cert_time_to_seconds(fields["notBefore"]) > now:
        return f"it is not valid before {fields['notBefore']}"
    return ""
