"""Compressed bodies."""

import zlib

from yuan_grpc.server.http.errors import BadEncodingError, TooLargeError, UnsupportedEncodingError

_DEFLATE = ("gzip", "x-gzip", "deflate")
_ANY_HEADER = 32 + zlib.MAX_WBITS
"""Accepts the headers of gzip and of zlib."""


def decode_body(raw: bytes, encoding: str, limit: int) -> bytes:
    """Return a body without its encoding.

    Args:
        encoding: the value of `Content-Encoding`; empty for none.
        limit: maximum size of the result, in bytes. More is not decompressed.

    Raises:
        BodyError: the encoding is not supported, the body does not have it, or the result is too large.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return raw
    if encoding not in _DEFLATE:
        raise UnsupportedEncodingError(encoding)
    decompressor = zlib.decompressobj(_ANY_HEADER)
    try:
        decoded = decompressor.decompress(raw, limit + 1)
    except zlib.error:
        raise BadEncodingError(encoding) from None
    if len(decoded) > limit:
        raise TooLargeError(limit)
    if not decompressor.eof or decompressor.unused_data:
        raise BadEncodingError(encoding)
    return decoded
