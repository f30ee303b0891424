"""Settings of who may connect and call: TLS, client certificates and tokens."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from yuan_grpc.server.settings import parsers as parse
from yuan_grpc.server.settings.environment import add_option, add_switch


@dataclass(frozen=True)
class SecuritySettings:
    """Settings of TLS and of callers' identities, for both ports.

    Attributes:
        tls_cert_file: the server's certificate, with its chain; None for plaintext.
        tls_key_file: the key of the certificate.
        tls_client_ca_file: the authorities of client certificates; None to request none.
        tls_allowed_names: names of client certificates that may call; empty for all.
        allow_plaintext: whether a port that other machines reach may be without TLS.
        token_file: the hashes of tokens; None to require none.
        share_prefix_cache: whether callers with names share cached prefixes.
    """

    tls_cert_file: Path | None = None
    tls_key_file: Path | None = None
    tls_client_ca_file: Path | None = None
    tls_allowed_names: tuple[str, ...] = ()
    allow_plaintext: bool = False
    token_file: Path | None = None
    share_prefix_cache: bool = False


def add_options(parser: argparse.ArgumentParser, environment: Mapping[str, str]) -> None:
    """Add the options to a parser, in a group."""
    group = parser.add_argument_group("security, see docs/secure.md")
    add: Callable[..., None] = partial(add_option, group, environment)
    add("--tls-cert-file", "", parse.optional_file, "FILE", "certificate (PEM), read again on changes")
    add("--tls-key-file", "", parse.optional_file, "FILE", "key of the certificate (PEM)")
    add("--tls-client-ca-file", "", parse.optional_file, "FILE", "require client certificates of these CAs")
    add("--tls-allowed-names", "", parse.items, "NAMES", "names of client certificates (default: all)")
    add_switch(group, environment, "--allow-plaintext", "other machines may connect without TLS")
    add("--token-file", "", parse.optional_file, "FILE", "require tokens; see `yuan-grpc token`")
    add_switch(group, environment, "--share-prefix-cache", "callers share cached prefixes (default: no)")


def read(options: argparse.Namespace) -> SecuritySettings:
    """Return the settings from parsed options."""
    return SecuritySettings(
        tls_cert_file=options.tls_cert_file,
        tls_key_file=options.tls_key_file,
        tls_client_ca_file=options.tls_client_ca_file,
        tls_allowed_names=options.tls_allowed_names,
        allow_plaintext=options.allow_plaintext,
        token_file=options.token_file,
        share_prefix_cache=options.share_prefix_cache,
    )
