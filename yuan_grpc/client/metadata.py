"""Metadata of calls: its checks, and the keys whose values are secrets."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

AUTHORIZATION = "authorization"
"""Metadata key that holds the token."""

GZIP_REQUEST = ("response-encoding", "gzip")
"""Metadata that asks the server to compress its responses."""

MetadataLike = Mapping[str, str | bytes] | Sequence[tuple[str, str | bytes]]
Pairs = tuple[tuple[str, str | bytes], ...]
AuthToken = str | Callable[[], str]

_KEY = re.compile(r"[0-9a-z_.-]+")
_PRINTABLE_ASCII = re.compile(r"[ -~]*")
_SECRET_KEY = re.compile(
    r"(.*[-_.])?(authorization|cookie|credentials?|api-?key|key|passwd|password|secret|session|token)(-bin)?"
)


def to_pairs(metadata: MetadataLike) -> Pairs:
    """Return metadata as pairs with lowercase keys.

    Raises:
        ValueError, TypeError: gRPC cannot send a key or a value. The message never has the value.
    """
    items = metadata.items() if isinstance(metadata, Mapping) else metadata
    pairs = tuple((key.lower(), value) for key, value in items)
    for key, value in pairs:
        _check(key, value)
    return pairs


def is_secret(key: str) -> bool:
    """Return whether the last word of a lowercase key names a secret: `authorization`, `x-api-key`, `session_token`."""
    return _SECRET_KEY.fullmatch(key) is not None


def bearer(token: AuthToken) -> str:
    """Return the value of `authorization` for a token or for a function that returns one.

    Raises:
        ValueError: the token is not printable ASCII. The message does not have the token.
    """
    text = token if isinstance(token, str) else token()
    if not isinstance(text, str) or not _PRINTABLE_ASCII.fullmatch(text):
        raise ValueError("`token` must be a text of printable ASCII characters")
    return f"Bearer {text}"


def _check(key: str, value: str | bytes) -> None:
    if not _KEY.fullmatch(key):
        raise ValueError(f"a key in `metadata` must have letters, digits, '_', '.' and '-' only, not {key!r}")
    if not isinstance(value, (str, bytes)):
        raise TypeError(f"`{key}` in `metadata` must be str or bytes, not {type(value).__name__}")
    text = value.decode("latin-1") if isinstance(value, bytes) else value
    if not key.endswith("-bin") and not _PRINTABLE_ASCII.fullmatch(text):
        raise ValueError(f"`{key}` in `metadata` must be printable ASCII")
