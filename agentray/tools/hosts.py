"""Decide which hosts a tool may call, by the text of an address: pure."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from urllib.parse import urljoin

import msgspec
from yarl import URL

from agentray.errors import ToolError

__all__ = [
    "HostRule",
    "Origin",
    "allowed",
    "host_rule",
    "is_address",
    "parse_url",
    "redirect_target",
]

_PORTS = {"http": 80, "https": 443}
# A space or a control character may mean something else to the next parser, a backslash too.
_UNSAFE = re.compile(r"[\x00-\x20\x7f-\xa0\\\u2028\u2029\ufeff]")
_AUTHORITY = re.compile(r"(https?)://([^/?#]*)(.*)", re.IGNORECASE | re.DOTALL)
_HOST_PORT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]+)(?::([0-9]{1,5}))?")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_RULE = re.compile(r"(?:(https?)://)?(\*\.)?([^*/?#@]+?)/?")


class Origin(msgspec.Struct, frozen=True, order=True):
    """Where a request goes: ``host`` is a lowercase name in ASCII or an IP address."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == _PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{host}{port}"


class HostRule(msgspec.Struct, frozen=True):
    """A host that may be called; with ``below``, all whose names end with it instead."""

    origin: Origin
    below: bool = False

    def fits(self, origin: Origin) -> bool:
        own = self.origin
        if (origin.scheme, origin.port) != (own.scheme, own.port):
            return False
        return origin.host.endswith("." + own.host) if self.below else origin.host == own.host


def allowed(origin: Origin, rules: Iterable[HostRule]) -> bool:
    """Return whether one of the rules fits."""
    return any(rule.fits(origin) for rule in rules)


def host_rule(text: str) -> HostRule:
    """Return the rule of ``[SCHEME://]HOST[:PORT]``, where HOST may begin with ``*.``.

    Without a scheme it is https.

    Raises:
        ValueError: it is none.
    """
    match = _RULE.fullmatch(text)
    if match is None:
        raise ValueError("expected api.example.com, *.example.com or http://host:8080")
    scheme, below, rest = match.groups()
    try:
        origin, _ = parse_url(f"{scheme or 'https'}://{rest}/")
    except ToolError as error:
        raise ValueError(error.message) from error
    if below and is_address(origin.host):
        raise ValueError("an IP address has nothing below it")
    return HostRule(origin, bool(below))


def parse_url(text: str) -> tuple[Origin, URL]:
    """Return where an absolute address leads, and it itself, to be requested as it is.

    What different parsers read differently is refused: users and passwords, backslashes, spaces
    and control characters, names that end in a number and are no plain IPv4 address.

    Raises:
        ToolError: it is refused; its reason is ``refused``, its message has nothing of the text.
    """
    match = None if _UNSAFE.search(text) else _AUTHORITY.fullmatch(text)
    if match is None:
        raise _refused("is no http or https address, or has characters that have to be encoded")
    scheme, authority, rest = match[1].lower(), match[2], match[3]
    if "@" in authority:
        raise _refused("has a user in it")
    place = _HOST_PORT.fullmatch(authority)
    if place is None:
        raise _refused("has no valid host")
    if not rest.isascii():
        raise _refused("has characters that have to be encoded")
    port = int(place[2]) if place[2] else _PORTS[scheme]
    if not 0 < port < 65536:
        raise _refused("has no valid port")
    origin = Origin(scheme, _host(place[1]), port)
    if not rest.startswith("/"):
        rest = "/" + rest
    try:
        url = URL(f"{origin}{rest.partition('#')[0]}", encoded=True)
    except ValueError as error:
        raise _refused("is not valid") from error
    if (url.scheme, url.raw_host, url.port) != (origin.scheme, origin.host, origin.port):
        raise _refused("can be read in two ways")
    return origin, url


def redirect_target(base: URL, location: str) -> str:
    """Return the absolute address that a ``Location`` leads to, not yet checked.

    Raises:
        ToolError: it cannot be read, or has characters that the next parser may drop.
    """
    if _UNSAFE.search(location):
        raise _refused("that the host redirects to has characters that have to be encoded")
    try:
        return urljoin(str(base), location)
    except ValueError:
        # Its message shows what the host sent.
        raise _refused("that the host redirects to is not valid") from None


def _host(text: str) -> str:
    if text.startswith("["):
        try:
            return str(ipaddress.IPv6Address(text[1:-1]))
        except ValueError as error:
            raise _refused("has no valid IPv6 address") from error
    try:
        host = text.lower() if text.isascii() else text.encode("idna").decode("ascii").lower()
    except UnicodeError as error:
        raise _refused("has no valid host") from error
    host = host.removesuffix(".")
    labels = host.split(".")
    if not all(_LABEL.fullmatch(label) for label in labels) or len(host) > 253:
        raise _refused("has no valid host")
    # 2130706433, 0x7f.1 and 0177.0.0.1 are all 127.0.0.1 to some.
    if _NUMBER.fullmatch(labels[-1]) and not is_address(host):
        raise _refused("has a number for a host")
    return host


def is_address(host: str) -> bool:
    """Return whether a host is an IP address, and no name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _refused(problem: str) -> ToolError:
    return ToolError(f"The address {problem}.", reason="refused")
