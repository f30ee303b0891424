"""The authentication of calls, by token or by client certificate."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from yuan_grpc.server.errors import PermissionDeniedError, UnauthenticatedError
from yuan_grpc.server.security.identity import ANONYMOUS, Identity
from yuan_grpc.server.security.tokens import TokenFile, TokenFileError
from yuan_grpc.server.settings.security import SecuritySettings
from yuan_grpc.server.start_error import StartError

_BEARER = "bearer"


class Authenticator:
    """Identifies callers.

    Args:
        tokens: the tokens and certificates with scopes; None if every caller has all of them.
        allowed_names: names of client certificates that may call; empty for all.
        needs_certificate: whether callers over the network need a client certificate.
        shares_cache: whether callers share cached prefixes.
    """

    def __init__(
        self,
        tokens: TokenFile | None = None,
        allowed_names: Collection[str] = (),
        *,
        needs_certificate: bool = False,
        shares_cache: bool = False,
    ) -> None:
        self._tokens = tokens
        self._allowed_names = frozenset(allowed_names)
        self._needs_certificate = needs_certificate
        self._shares_cache = shares_cache

    @classmethod
    def from_settings(cls, settings: SecuritySettings) -> "Authenticator":
        """Return the authenticator of the settings.

        Raises:
            StartError: the token file cannot be read or used.
        """
        try:
            tokens = TokenFile(settings.token_file) if settings.token_file else None
        except TokenFileError as error:
            raise StartError(str(error)) from None
        return cls(
            tokens,
            settings.tls_allowed_names,
            needs_certificate=settings.tls_client_ca_file is not None,
            shares_cache=settings.share_prefix_cache,
        )

    def identify(
        self, authorization: str | None = None, names: Sequence[str] = (), *, is_local: bool = False
    ) -> Identity:
        """Return the identity of a caller.

        Args:
            authorization: the value of `authorization`; None if it is absent.
            names: the names of the client certificate; empty without one.
            is_local: whether the call came over the unix socket, where no certificates are.

        Raises:
            UnauthenticatedError: the token is missing or unknown, or a certificate is missing.
            PermissionDeniedError: no name of the certificate is allowed.
        """
        if self._needs_certificate and not is_local:
            self._check_names(names)
        return replace(self._find(authorization, names), shares_cache=self._shares_cache)

    def _find(self, authorization: str | None, names: Sequence[str]) -> Identity:
        if self._tokens is None:
            return Identity(primary_name(names)) if names else ANONYMOUS
        identity = self._tokens.find_certificate(names) if authorization is None else self._find_token(authorization)
        if identity is None:
            raise UnauthenticatedError("`authorization` must be `Bearer` and a token of this server")
        return identity

    def _find_token(self, authorization: str) -> Identity | None:
        assert self._tokens is not None
        scheme, _, token = authorization.strip().partition(" ")
        return self._tokens.find_token(token.strip()) if scheme.lower() == _BEARER else None

    def _check_names(self, names: Sequence[str]) -> None:
        if not names:
            raise UnauthenticatedError("a client certificate is required")
        if self._allowed_names and self._allowed_names.isdisjoint(names):
            raise PermissionDeniedError(f"the client certificate of {primary_name(names):.256} is not allowed here")


def primary_name(names: Sequence[str]) -> str:
    """Return the name of a certificate that identifies its owner: a URI if it has one, such as a SPIFFE id.

    Characters that are not printable are replaced, since the name is written to the log.
    """
    name = next((name for name in names if "://" in name), names[0])
    return "".join(character if character.isprintable() else "?" for character in name)


OPEN = Authenticator()
"""Identifies no one, and lets every caller do everything."""
