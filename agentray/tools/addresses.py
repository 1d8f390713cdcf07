"""Decide which network addresses a tool may be connected to: pure."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

__all__ = ["address_problem"]

# Reachable from inside of a cloud only, and asked for credentials: no setting opens these. In
# turn of AWS and most others, Azure, Alibaba, Oracle; AWS, Google, Oracle, Scaleway, Alibaba,
# Akamai.
_METADATA = tuple(
    map(
        ip_network,
        (
            *("169.254.0.0/16", "168.63.129.16/32", "100.100.100.200/32", "192.0.0.192/32"),
            *("fd00:ec2::/32", "fd20:ce::/32", "fd00:c1::/32", "fd00:42::/32"),
            *("fd00:100::/32", "fd00:a9fe:a9fe::/48"),
        ),
    )
)
# Global as some of Python's tables have it: they carry another address, or are for documents.
_NOT_GLOBAL = tuple(
    map(ip_network, ("192.88.99.0/24", "2001::/32", "2002::/16", "3fff::/20", "64:ff9b::/96"))
)
_UNICAST = ip_network("2000::/3")
_PRIVATE = tuple(
    map(
        ip_network,
        (
            *("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "127.0.0.0/8"),
            *("fc00::/7", "::1/128"),
        ),
    )
)


def address_problem(address: str, *, private: bool = False) -> str | None:
    """Return why a tool may not be connected to an address, or None if it may.

    It may be to global unicast addresses and, with ``private``, to those of private networks and
    of this machine. Never to link-local ones, to multicast, to those that only carry another
    address, nor to where clouds hand out credentials. An IPv6 address that stands for an IPv4
    address is judged as that.
    """
    try:
        found = ip_address(address)
    except ValueError:
        return "is no IP address"
    if isinstance(found, IPv6Address):
        if found.scope_id is not None:
            return "is of one interface"
        if found.ipv4_mapped is not None:
            found = found.ipv4_mapped
    if any(found in network for network in _METADATA):
        return "is a cloud's metadata address"
    if found.is_multicast:
        return "is a multicast address"
    if found.is_link_local:
        return "is a link-local address"
    if found.is_unspecified:
        return "is no address of a host"
    if _is_global(found):
        return None
    if private and any(found in network for network in _PRIVATE):
        return None
    return "is not a public address"


def _is_global(address: IPv4Address | IPv6Address) -> bool:
    if any(address in network for network in _NOT_GLOBAL):
        return False
    if isinstance(address, IPv6Address) and address not in _UNICAST:
        return False
    return address.is_global and not address.is_reserved
