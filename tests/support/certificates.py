"""Certificates for servers and clients of tests."""

import subprocess
from pathlib import Path
from shutil import which

import grpc
import pytest


def create_certificates(folder: Path) -> Path:
    """Write a CA and the certificates it signed for a server and a client to the folder, and return it."""
    if which("openssl") is None:
        pytest.skip("the openssl command is needed to create certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=authority", "-days", "2")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost")
    for name in ("server", "client"):
        openssl("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names")
        openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *signed)
    return folder


def server_credentials(folder: Path, *, mutual: bool = False) -> grpc.ServerCredentials:
    """Return the credentials of a server; `mutual` for one that requires a client certificate."""
    pair = (folder / "server.key").read_bytes(), (folder / "server.pem").read_bytes()
    authority = (folder / "ca.pem").read_bytes() if mutual else None
    return grpc.ssl_server_credentials([pair], authority, require_client_auth=mutual)
