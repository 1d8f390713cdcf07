"""Connect to checked addresses only: each name is looked up once, judged, and then connected to."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Sequence

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from agentray.tools.addresses import address_problem
from agentray.tools.hosts import is_address

__all__ = ["AddressRefusedError", "Lookup", "look_up", "open_egress", "open_stream"]

Lookup = Callable[[str, int], Awaitable[Sequence[str]]]
"""Returns the IP addresses of a name; raises ``OSError``."""

_CONNECTIONS = 100
_CONNECTIONS_OF_HOST = 20
_IDLE_S = 15.0


class AddressRefusedError(OSError):
    """A name leads to an address that no tool may be connected to."""


async def look_up(host: str, port: int) -> Sequence[str]:
    """Ask the system for the addresses of a name."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


async def _checked(lookup: Lookup, host: str, port: int, *, private: bool) -> list[str]:
    """Return the addresses of a name, all of which may be connected to."""
    addresses = list(dict.fromkeys(await lookup(host, port)))
    for address in addresses:
        # One bad address among good ones is an attack or a mistake: none of them is taken.
        if (problem := address_problem(address, private=private)) is not None:
            raise AddressRefusedError(problem)
    if not addresses:
        raise OSError("the name has no address")
    return addresses


class _CheckedResolver(AbstractResolver):
    def __init__(self, lookup: Lookup, private: Callable[[str, int], bool]) -> None:
        self._lookup = lookup
        self._private = private

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        private = self._private(host, port)
        addresses = await _checked(self._lookup, host, port, private=private)
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in addresses
        ]

    async def close(self) -> None:
        pass


def open_egress(
    private: Callable[[str, int], bool], *, connect_timeout_s: float, lookup: Lookup = look_up
) -> aiohttp.ClientSession:
    """Return a session that follows no redirects, keeps no cookies and heeds no proxy variables.

    ``private`` says whether the addresses of a host and port may be private.
    """
    connector = aiohttp.TCPConnector(
        resolver=_CheckedResolver(lookup, private),
        # Kept addresses would be judged once for all.
        use_dns_cache=False,
        family=socket.AF_UNSPEC,
        limit=_CONNECTIONS,
        limit_per_host=_CONNECTIONS_OF_HOST,
        keepalive_timeout=_IDLE_S,
    )
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s),
        # It is counted and cut as it comes.
        auto_decompress=False,
        trust_env=False,
    )


async def open_stream(
    host: str, port: int, *, private: bool, connect_timeout_s: float, lookup: Lookup = look_up
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to a host by the first of its addresses that answers.

    Raises:
        AddressRefusedError: an address of it is none that may be connected to.
        OSError: none answers in time.
    """
    async with asyncio.timeout(connect_timeout_s):
        if is_address(host):
            lookup = _itself
        addresses = await _checked(lookup, host, port, private=private)
        for address in addresses[:-1]:
            with contextlib.suppress(OSError):
                return await asyncio.open_connection(address, port)
        return await asyncio.open_connection(addresses[-1], port)


async def _itself(host: str, port: int) -> Sequence[str]:
    return [host]
