"""The identity of the caller of a gRPC call."""

from collections.abc import Mapping
from typing import Any

import grpc

from yuan_grpc.server.security.authentication import Authenticator
from yuan_grpc.server.security.identity import Identity, Scope

ADMIN_METHODS = frozenset(("ListLoras", "LoadLora", "UnloadLora"))
"""Methods of `YuanService` that need the scope `admin`. Abort needs it for the calls of others only."""

_AUTHORIZATION = "authorization"


def required_scope(method: str) -> Scope:
    """Return the scope that a method of `YuanService` needs."""
    return Scope.ADMIN if method in ADMIN_METHODS else Scope.GENERATE


def identify(authenticator: Authenticator, context: "grpc.aio.ServicerContext[Any, Any]") -> Identity:
    """Return the identity of the caller, by its token or by its client certificate.

    Raises:
        ServiceError: the caller is unknown or not allowed.
    """
    metadata = [str(value) for key, value in context.invocation_metadata() or () if key == _AUTHORIZATION]
    authorization = metadata[0] if len(metadata) == 1 else " ".join(metadata) or None  # several are no token
    names = _certificate_names(context.auth_context())
    return authenticator.identify(authorization, names, is_local=context.peer().startswith("unix:"))


def _certificate_names(properties: Mapping[str, Any]) -> list[str]:
    """Return the alternative names of the client certificate, or else its common name."""
    names = properties.get("x509_subject_alternative_name") or properties.get("x509_common_name") or ()
    return [name.decode(errors="replace") for name in names]
