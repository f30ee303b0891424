"""The identity of a caller, and what it may do."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum

from yuan_grpc.server.errors import PermissionDeniedError


class Scope(StrEnum):
    """A permission. `ADMIN` includes `GENERATE`."""

    GENERATE = "generate"
    ADMIN = "admin"


ALL_SCOPES = frozenset(Scope)


@dataclass(frozen=True)
class Identity:
    """The maker of a call.

    Attributes:
        name: the name of the token or of the client certificate; empty for an anonymous caller.
        scopes: what the caller may do.
        shares_cache: whether its cached prefixes are shared with other callers.
    """

    name: str = ""
    scopes: frozenset[Scope] = ALL_SCOPES
    shares_cache: bool = False

    @property
    def is_admin(self) -> bool:
        """Whether the caller may do what concerns others."""
        return Scope.ADMIN in self.scopes

    def require(self, scope: Scope, action: str) -> None:
        """Raise PermissionDeniedError if the caller lacks a scope.

        Args:
            action: the method or route that needs it.
        """
        if scope not in self.scopes and not self.is_admin:
            raise PermissionDeniedError(f"{action} needs the scope {scope}, which {self.name} does not have")

    @property
    def has_own_cache(self) -> bool:
        """Whether no other caller can have filled the cached prefixes of its requests."""
        return bool(self.name) and not self.shares_cache

    def cache_salt(self, salt: str) -> str:
        """Return the salt of cached prefixes: of the request, or of this caller's requests with the same salt."""
        return hashlib.sha256(f"{self.name}\0{salt}".encode()).hexdigest() if self.has_own_cache else salt


ANONYMOUS = Identity()
"""The caller of a server that identifies no one. It may do everything, but has no name to own calls by."""

_current: ContextVar[Identity] = ContextVar("identity", default=ANONYMOUS)
_peer: ContextVar[str] = ContextVar("peer", default="")

_LOOPBACK = ("ipv4:127.", "ipv6:%5B::1%5D:", "ipv6:[::1]:", "http:127.", "http:[::1]:")


def current_identity() -> Identity:
    """Return the identity of the current call; outside of a call, the anonymous one."""
    return _current.get()


@contextmanager
def calling_as(identity: Identity, peer: str = "") -> Iterator[Identity]:
    """Make an identity the current one in the block, and in the tasks that it starts; yield it.

    Args:
        peer: the address of the caller.
    """
    token, peer_token = _current.set(identity), _peer.set(peer)
    try:
        yield identity
    finally:
        _current.reset(token)
        _peer.reset(peer_token)


def current_share() -> str:
    """Return who shares one part of the queue with the current call: callers of one name, or else of one host.

    On the same machine, each connection has its own part.
    """
    if name := _current.get().name:
        return f"name:{name}"
    peer = _peer.get()
    return peer if peer.startswith(_LOOPBACK) else peer.rpartition(":")[0] or peer
