"""Speak MCP over HTTP with checked addresses only, and take in no more than is meant."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx2
import msgspec

from agentray.tools.addresses import address_problem
from agentray.tools.egress import Lookup

__all__ = ["open_http"]

_CONNECT_S = 10.0
# Nobody waits for the answer to a notification, and whatever comes next waits for its end.
_NOTIFY_S = 5.0
# Of a stream, beside the room for two messages: what a server may say unasked.
_STREAM_BYTES_PER_S = 256 * 1024


class _Kind(msgspec.Struct):
    id: int | str | None = None


class _Bounded(httpx2.AsyncByteStream):
    """A body that breaks off when it is longer than it may be by now."""

    def __init__(self, stream: httpx2.AsyncByteStream, most_bytes: int, bytes_per_s: float) -> None:
        self._stream = stream
        self._most = most_bytes
        self._bytes_per_s = bytes_per_s

    async def __aiter__(self) -> AsyncIterator[bytes]:
        began, taken = time.monotonic(), 0
        async for chunk in self._stream:
            taken += len(chunk)
            if taken > self._most + (time.monotonic() - began) * self._bytes_per_s:
                raise httpx2.ReadError("the server sends more than it may")
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


class _Checked(httpx2.AsyncBaseTransport):
    """Connects to an address that was judged, not to a name that may mean another one by then."""

    def __init__(
        self, inner: httpx2.AsyncBaseTransport, lookup: Lookup, *, private: bool, most_bytes: int
    ) -> None:
        self._inner = inner
        self._lookup = lookup
        self._private = private
        self._most_bytes = most_bytes

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        host = request.url.host
        port = request.url.port or (443 if request.url.scheme == "https" else 80)
        # The name stays in the Host header, and is what the certificate has to be for.
        extensions = {**request.extensions, "sni_hostname": host}
        if request.method == "POST" and not _is_request(request.content):
            extensions["timeout"] = httpx2.Timeout(_NOTIFY_S).as_dict()
        *others, last = await self._addresses(host, port)
        for address in others:
            # Where one protocol leads nowhere, another may: localhost often has two addresses.
            try:
                response = await self._sent(request, address, extensions)
                break
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                continue
        else:
            response = await self._sent(request, last, extensions)
        return await self._bounded(response)

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def _sent(
        self, request: httpx2.Request, address: str, extensions: dict[str, Any]
    ) -> httpx2.Response:
        pinned = httpx2.Request(
            request.method,
            request.url.copy_with(host=address),
            headers=request.headers,
            stream=request.stream,
            extensions=extensions,
        )
        return await self._inner.handle_async_request(pinned)

    async def _bounded(self, response: httpx2.Response) -> httpx2.Response:
        if response.headers.get("content-encoding", "identity") != "identity":
            # A small answer could become a large one.
            await response.aclose()
            raise httpx2.ReadError("the server compresses what it was asked not to")
        streamed = response.headers.get("content-type", "").startswith("text/event-stream")
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        response.stream = _Bounded(
            response.stream,
            self._most_bytes * 2 if streamed else self._most_bytes,
            _STREAM_BYTES_PER_S if streamed else 0.0,
        )
        return response

    async def _addresses(self, host: str, port: int) -> list[str]:
        try:
            addresses = list(dict.fromkeys(await self._lookup(host, port)))
        except OSError as error:
            raise httpx2.ConnectError("the name of the server cannot be looked up") from error
        for address in addresses:
            # One bad address among good ones is an attack or a mistake: none of them is taken.
            if (problem := address_problem(address, private=self._private)) is not None:
                raise httpx2.ConnectError(f"the address of the server {problem}")
        if not addresses:
            raise httpx2.ConnectError("the name of the server has no address")
        return addresses


def _is_request(body: bytes) -> bool:
    try:
        return msgspec.json.decode(body, type=_Kind).id is not None
    except msgspec.DecodeError:
        return False


def open_http(
    headers: Mapping[str, str],
    lookup: Lookup,
    *,
    private: bool,
    most_bytes: int,
    read_timeout_s: float,
) -> httpx2.AsyncClient:
    """Return a client for one server.

    It follows no redirects, heeds no proxies of the environment and asks for plain bodies.
    ``private``: the server's address may be a private one.
    """
    inner = httpx2.AsyncHTTPTransport(trust_env=False)
    return httpx2.AsyncClient(
        headers={**headers, "accept-encoding": "identity"},
        transport=_Checked(inner, lookup, private=private, most_bytes=most_bytes),
        timeout=httpx2.Timeout(_CONNECT_S, read=read_timeout_s),
        trust_env=False,
    )
