"""gRPC targets: their syntax, and whether they are on this machine."""

from __future__ import annotations

import re

_SCHEME = re.compile(r"(dns|ipv4|ipv6|unix|unix-abstract|vsock|xds):")
_HOST_AND_PORT = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]]+):[0-9]+")
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z.-]+)(:[0-9]+)?")
"""An address that is_local can judge. Anything else, such as a query or an encoded character, is not local."""


def is_valid(target: str) -> bool:
    """Return whether a target is host:port or begins with a scheme of gRPC."""
    return bool(_SCHEME.match(target) or _HOST_AND_PORT.fullmatch(target))


def to_uri(target: str) -> str:
    """Return the target with its scheme, `dns` by default."""
    return target if _SCHEME.match(target) else f"dns:///{target}"


def is_local(target: str) -> bool:
    """Return whether a target is certainly on this machine, judged by its text alone.

    The name `localhost` counts, as RFC 6761 reserves it for loopback addresses. A target with an authority, such as
    dns://server/localhost, does not: another server resolves the name.
    """
    scheme, _, address = to_uri(target).partition(":")
    has_authority = address.startswith("//") and not address.startswith("///")
    if scheme in ("unix", "unix-abstract"):
        return not has_authority
    if scheme not in ("dns", "ipv4", "ipv6"):
        return False
    address_list = address.removeprefix("///")
    return all(map(_is_loopback, [address_list] if scheme == "dns" else address_list.split(",")))


def _is_loopback(address: str) -> bool:
    match = _ADDRESS.fullmatch(address)
    if match is None:
        return False
    import ipaddress  # together with channel options, not with the client

    host = match[1].strip("[]")
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return host.lower() == "localhost"
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None  # judged only by Python 3.13 and later
    return (mapped or ip).is_loopback
