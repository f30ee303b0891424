"""The token file: names, scopes, and hashes of tokens or names of client certificates.

A line is `NAME SCOPES sha256:HASH` or `NAME SCOPES cert:NAME`, with scopes separated by commas. Empty lines and lines
that begin with `#` are ignored. A name may have several lines, as while a token is replaced.
"""

import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from yuan_grpc.server.security.files import file_version
from yuan_grpc.server.security.identity import Identity, Scope

logger = logging.getLogger(__name__)

PREFIX = "yuan_"
"""Start of a token, by which scanners find one in a repository."""
TOKEN_BYTES = 32
"""Random bytes of a token. A fast hash suffices for them: no list or guess finds one."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_HASH = re.compile(r"[0-9a-f]{64}")


class TokenFileError(ValueError):
    """A token file that cannot be used. The text names the line and the rule."""


@dataclass(frozen=True)
class Entry:
    """One line: an identity, and the hash or the certificate name that proves it; the other one is empty."""

    identity: Identity
    digest: str = ""
    certificate: str = ""


def create_token() -> str:
    """Return a new random token."""
    return PREFIX + secrets.token_urlsafe(TOKEN_BYTES)


def hash_token(token: str) -> str:
    """Return the hash of a token, as lines have it."""
    return hashlib.sha256(token.encode()).hexdigest()


def format_line(name: str, scopes: Iterable[Scope], token: str) -> str:
    """Return the line for a token."""
    return f"{name} {','.join(scopes)} sha256:{hash_token(token)}"


def is_name(name: str) -> bool:
    """Return whether a line may have this name."""
    return _NAME.fullmatch(name) is not None


def parse(text: str) -> Sequence[Entry]:
    """Return the entries of a file.

    Raises:
        TokenFileError: a line is malformed. The message does not have its hash, which may be a token by mistake.
    """
    lines = enumerate(map(str.strip, text.splitlines()), start=1)
    entries = [_parse_line(number, line) for number, line in lines if line and not line.startswith("#")]
    if not entries:
        raise TokenFileError("it has no line with a token: create one with `yuan-grpc token NAME`")
    return entries


def _parse_line(number: int, line: str) -> Entry:
    words = line.split()
    if len(words) != 3:
        raise TokenFileError(f"line {number} must be NAME SCOPES sha256:HASH, and has {len(words)} words")
    name, scopes, proof = words
    if not is_name(name):
        raise TokenFileError(f"line {number}: the name must have letters, digits and ._@- only, not {name!r}")
    identity = Identity(name, frozenset(_parse_scope(number, scope) for scope in scopes.split(",")))
    kind, _, value = proof.partition(":")
    if kind == "sha256" and _HASH.fullmatch(value):
        return Entry(identity, digest=value)
    if kind == "cert" and value:
        return Entry(identity, certificate=value)
    raise TokenFileError(
        f"line {number}: the third word must be sha256: with 64 hexadecimal digits, or cert: with a name"
    )


def _parse_scope(number: int, scope: str) -> Scope:
    if scope not in tuple(Scope):
        raise TokenFileError(f"line {number}: a scope must be generate or admin, not {scope!r}")
    return Scope(scope)


class TokenFile:
    """The entries of a file, which is read again when it changes. A malformed one leaves the last entries in use.

    Raises:
        TokenFileError: the file cannot be read or used.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._version = file_version(file)
        self._entries = read(file)

    def find_token(self, token: str) -> Identity | None:
        """Return the identity of a token; None if it is unknown.

        All hashes are compared, each in constant time, so that response times show nothing about them.
        """
        digest, found = hash_token(token), None
        for entry in self._current():
            if hmac.compare_digest(entry.digest, digest):
                found = entry.identity
        return found

    def find_certificate(self, names: Iterable[str]) -> Identity | None:
        """Return the identity of a client certificate by its names; None if no line has one of them."""
        names = set(names)
        return next((entry.identity for entry in self._current() if entry.certificate in names), None)

    def _current(self) -> Sequence[Entry]:
        if (changed := file_version(self._file)) != self._version:
            self._version = changed
            try:
                self._entries = read(self._file)
            except TokenFileError as error:
                logger.error("%s; the tokens from before stay valid", error)
            else:
                logger.info("read the token file again: %d entries", len(self._entries))
        return self._entries


def read(file: Path) -> Sequence[Entry]:
    """Return the entries of a file.

    Raises:
        TokenFileError: the file cannot be read or used.
    """
    try:
        return parse(file.read_text("utf-8"))
    except OSError as error:
        raise TokenFileError(
            f"--token-file must be a file that this user can read, not {file}: {error.strerror}"
        ) from None
    except UnicodeError:
        raise TokenFileError(f"--token-file {file}: it must be a text file") from None
    except TokenFileError as error:
        raise TokenFileError(f"--token-file {file}: {error}") from None
