"""Certificates for servers and clients of tests."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

LOCAL_NAMES = ("127.0.0.1", "::1", "localhost")
VALID = timedelta(days=2)
EXPIRED = timedelta(hours=-1)


class Authority:
    """A certificate authority.

    Attributes:
        pem: its certificate.
    """

    def __init__(self, name: str = "authority") -> None:
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(self._name, self._name, self._key.public_key(), VALID)
        constraint = x509.BasicConstraints(ca=True, path_length=None)
        self.pem = _to_pem(builder.add_extension(constraint, critical=True).sign(self._key, hashes.SHA256()))

    def issue(
        self, name: str = "server", alternatives: Sequence[str] = LOCAL_NAMES, valid: timedelta = VALID
    ) -> tuple[bytes, bytes]:
        """Return a certificate and its key, for addresses, URIs and host names, which may have expired."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = _builder(subject, self._name, key.public_key(), valid)
        if alternatives:
            names = x509.SubjectAlternativeName([_general_name(alternative) for alternative in alternatives])
            builder = builder.add_extension(names, critical=False)
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return _to_pem(builder.sign(self._key, hashes.SHA256())), private

    def write(
        self,
        folder: Path,
        name: str = "server",
        alternatives: Sequence[str] = LOCAL_NAMES,
        valid: timedelta = VALID,
    ) -> tuple[Path, Path]:
        """Write a new certificate and its key to a folder; return the files."""
        files = folder / f"{name}.pem", folder / f"{name}.key"
        for file, contents in zip(files, self.issue(name, alternatives, valid), strict=True):
            file.write_bytes(contents)
            file.chmod(0o600)
        return files


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, valid: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - VALID)
        .not_valid_after(now + valid)
    )


def _general_name(name: str) -> x509.GeneralName:
    if "://" in name:
        return x509.UniformResourceIdentifier(name)
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _to_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def create_certificates(folder: Path) -> Path:
    """Write a CA and the certificates it signed for a server and a client to the folder, and return it."""
    authority = Authority()
    (folder / "ca.pem").write_bytes(authority.pem)
    for name in ("server", "client"):
        authority.write(folder, name)
    return folder


def server_credentials(folder: Path, *, mutual: bool = False) -> grpc.ServerCredentials:
    """Return the credentials of a server; `mutual` for one that requires a client certificate."""
    pair = (folder / "server.key").read_bytes(), (folder / "server.pem").read_bytes()
    authority = (folder / "ca.pem").read_bytes() if mutual else None
    return grpc.ssl_server_credentials([pair], authority, require_client_auth=mutual)
