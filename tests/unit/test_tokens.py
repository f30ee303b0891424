"""The token file, and the command that writes its lines."""

import hmac
import os
import stat
from pathlib import Path

import pytest

from yuan_grpc.__main__ import main
from yuan_grpc.server.security import tokens
from yuan_grpc.server.security.identity import ANONYMOUS, Identity, Scope
from yuan_grpc.server.security.tokens import TokenFile, TokenFileError, create_token, format_line

PROOF_RULE = "the third word must be sha256: with 64 hexadecimal digits, or cert: with a name"
GENERATE, ADMIN = frozenset({Scope.GENERATE}), frozenset({Scope.ADMIN})


def write(file: Path, *lines: str) -> Path:
    """Replace a file at once, as tools do."""
    new = file.with_suffix(".new")
    new.write_text("\n".join(lines))
    os.replace(new, file)
    return file


def test_tokens_are_found_by_their_hashes(tmp_path: Path) -> None:
    alice, bob = create_token(), create_token()
    lines = ("# callers", format_line("alice", GENERATE, alice), "", format_line("bob", ADMIN, bob))
    found = TokenFile(write(tmp_path / "tokens", *lines))
    assert alice not in "".join(lines)
    assert found.find_token(alice) == Identity("alice", GENERATE)
    assert found.find_token(bob) == Identity("bob", ADMIN)
    assert found.find_token("") is found.find_token(alice + "a") is found.find_token(tokens.hash_token(alice)) is None


def test_every_hash_is_compared_in_constant_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [create_token() for _ in range(5)]
    found = TokenFile(write(tmp_path / "tokens", *(format_line(f"n{i}", GENERATE, t) for i, t in enumerate(made))))
    compared: list[tuple[str, str]] = []
    original = hmac.compare_digest

    def compare_digest(a: str, b: str) -> bool:
        compared.append((a, b))
        return original(a, b)

    monkeypatch.setattr(hmac, "compare_digest", compare_digest)
    for token in (made[0], made[4], "wrong"):
        compared.clear()
        found.find_token(token)
        assert compared == [(tokens.hash_token(known), tokens.hash_token(token)) for known in made]


def test_a_name_may_have_two_tokens_while_one_is_replaced(tmp_path: Path) -> None:
    old, new = create_token(), create_token()
    file = write(tmp_path / "tokens", format_line("alice", GENERATE, old))
    found = TokenFile(file)
    assert found.find_token(new) is None
    write(file, format_line("alice", GENERATE, old), format_line("alice", GENERATE, new))
    assert found.find_token(old) == found.find_token(new) == Identity("alice", GENERATE)
    write(file, format_line("alice", GENERATE, new))
    assert found.find_token(old) is None


def test_a_malformed_or_missing_file_leaves_the_last_tokens_valid(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    token = create_token()
    file = write(tmp_path / "tokens", format_line("alice", GENERATE, token))
    found = TokenFile(file)
    write(file, "alice generate")
    assert found.find_token(token) == Identity("alice", GENERATE)
    file.unlink()
    assert found.find_token(token) == Identity("alice", GENERATE)
    assert len(caplog.records) == 2


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("alice generate", "line 2 must be NAME SCOPES sha256:HASH, and has 2 words"),
        ("a/b generate sha256:" + "0" * 64, "line 2: the name must have letters, digits and ._@- only, not 'a/b'"),
        ("alice root sha256:" + "0" * 64, "line 2: a scope must be generate or admin, not 'root'"),
        ("alice generate yuan_secret", f"line 2: {PROOF_RULE}"),
        ("alice generate sha256:00", f"line 2: {PROOF_RULE}"),
    ],
)
def test_a_malformed_line_is_named_without_its_secret(tmp_path: Path, line: str, rule: str) -> None:
    file = write(tmp_path / "tokens", "# a comment", line)
    with pytest.raises(TokenFileError) as error:
        TokenFile(file)
    assert str(error.value) == f"--token-file {file}: {rule}"


def test_a_file_without_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenFileError, match="no line with a token"):
        TokenFile(write(tmp_path / "tokens", "# nothing"))


def test_certificates_have_lines_too(tmp_path: Path) -> None:
    found = TokenFile(write(tmp_path / "tokens", "gateway generate,admin cert:spiffe://example/gateway"))
    assert found.find_certificate(["a.example", "spiffe://example/gateway"]) == Identity("gateway", GENERATE | ADMIN)
    assert found.find_certificate(["a.example"]) is found.find_certificate([""]) is None
    assert found.find_token("") is None


def test_salts_differ_between_callers_and_stay_for_anonymous_ones() -> None:
    alice, bob = Identity("alice"), Identity("bob")
    salts = {caller.cache_salt(salt) for caller in (alice, bob) for salt in ("", "a")}
    assert len(salts) == 4
    assert ANONYMOUS.cache_salt("a") == "a"
    assert ANONYMOUS.cache_salt("") == ""


def test_the_command_prints_a_token_and_appends_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tokens"
    made = []
    for arguments in (["alice"], ["bob", "--scope", "admin"]):
        assert main(["token", *arguments, "--file", str(file)]) == 0
        made.append(capsys.readouterr().out.strip())
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    found = TokenFile(file)
    assert [found.find_token(token) for token in made] == [Identity("alice", GENERATE), Identity("bob", ADMIN)]
    assert not any(token in file.read_text() for token in made)


def test_the_command_without_a_file_prints_the_line_apart(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["token", "alice"]) == 0
    out, err = capsys.readouterr()
    assert err.strip() == f"line for --token-file: {format_line('alice', GENERATE, out.strip())}"
