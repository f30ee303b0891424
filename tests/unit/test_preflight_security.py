"""The checks of certificates, keys and sockets before vLLM is imported."""

import logging
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from certificates import EXPIRED, Authority

from yuan_grpc.preflight import security
from yuan_grpc.server.settings import DEMO, Settings
from yuan_grpc.server.settings.grpc_port import GrpcSettings
from yuan_grpc.server.settings.security import SecuritySettings
from yuan_grpc.server.start_error import StartError


def check(host: str = "127.0.0.1", unix_socket: Path | None = None, **fields: Any) -> None:
    settings = Settings(DEMO, host, 50051, 30, (), security=SecuritySettings(**fields))
    security.check(replace(settings, grpc=GrpcSettings(unix_socket=unix_socket)))


def refusal(**fields: Any) -> str:
    with pytest.raises(StartError) as error:
        check(**fields)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, Any]:
    certificate, key = Authority().write(tmp_path)
    return {"tls_cert_file": certificate, "tls_key_file": key}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
def test_a_loopback_address_may_be_in_plaintext(host: str) -> None:
    check(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_addresses_need_tls_or_a_word(host: str, pair: dict[str, Any]) -> None:
    assert refusal(host=host).startswith(f"--host {host} lets other machines connect without TLS")
    check(host, allow_plaintext=True)
    check(host, **pair)


def test_options_that_need_others_name_them(pair: dict[str, Any], tmp_path: Path) -> None:
    assert refusal(tls_cert_file=pair["tls_cert_file"]).startswith("--tls-cert-file needs --tls-key-file")
    assert refusal(tls_key_file=pair["tls_key_file"]).startswith("--tls-key-file needs --tls-cert-file")
    assert refusal(tls_client_ca_file=tmp_path).startswith("--tls-client-ca-file needs --tls-cert-file")
    assert refusal(tls_allowed_names=("a",), **pair).startswith("--tls-allowed-names needs --tls-client-ca-file")


def test_a_key_of_another_certificate_is_refused(pair: dict[str, Any], tmp_path: Path) -> None:
    _, other = Authority().write(tmp_path, "other")
    expected = f"--tls-key-file must be the key of {pair['tls_cert_file']}, and {other} is another's"
    assert refusal(**pair | {"tls_key_file": other}) == expected


def test_files_that_are_missing_or_of_another_kind_are_named(pair: dict[str, Any], tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("hello")
    text.chmod(0o600)
    missing = tmp_path / "missing"
    assert "must be a file that this user can read" in refusal(**pair | {"tls_cert_file": missing})
    assert "must be a file that this user can read" in refusal(**pair | {"tls_key_file": missing})
    assert "--tls-client-ca-file must be a file" in refusal(**pair, tls_client_ca_file=missing)
    assert refusal(**pair | {"tls_cert_file": text}).startswith("--tls-cert-file must be a PEM file of a certificate")
    assert refusal(**pair | {"tls_key_file": text}).startswith("--tls-key-file must be a PEM file of a key")
    assert refusal(**pair, tls_client_ca_file=text).startswith("--tls-client-ca-file must be a PEM file")


def test_a_key_that_every_user_can_read_is_refused(pair: dict[str, Any]) -> None:
    pair["tls_key_file"].chmod(0o644)
    assert refusal(**pair) == (
        f"--tls-key-file must not be readable by every user, and {pair['tls_key_file']} is (mode 0644): "
        f"chmod o= {pair['tls_key_file']}"
    )
    pair["tls_key_file"].chmod(0o640)
    check(**pair)


def test_a_token_file_must_be_private_and_well_formed(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    assert refusal(token_file=file).startswith("--token-file must be a file that this user can read")
    file.write_text("alice generate\n")
    file.chmod(0o644)
    assert refusal(token_file=file).startswith("--token-file must not be readable by every user")
    file.chmod(0o600)
    rule = "line 1 must be NAME SCOPES sha256:HASH, and has 2 words"
    assert refusal(token_file=file) == f"--token-file {file}: {rule}"
    file.write_text(f"alice generate sha256:{'0' * 64}\n")
    check(token_file=file)


def test_an_expired_certificate_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    certificate, key = Authority().write(tmp_path, valid=EXPIRED)
    with caplog.at_level(logging.WARNING):
        check(tls_cert_file=certificate, tls_key_file=key)
    assert f"clients will refuse the certificate {certificate}: it expired on " in caplog.text


def test_a_unix_socket_must_be_free(tmp_path: Path) -> None:
    check(unix_socket=tmp_path / "socket")
    (tmp_path / "file").touch()
    assert "is another file" in refusal(unix_socket=tmp_path / "file")
    assert "must be in a folder" in refusal(unix_socket=tmp_path / "none" / "socket")
    assert "at most 107 bytes" in refusal(unix_socket=tmp_path / ("a" * 100))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        check(unix_socket=tmp_path / "socket")  # of a server that was killed
        listening.listen()
        assert "is in use" in refusal(unix_socket=tmp_path / "socket")
