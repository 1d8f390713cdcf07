"""Let a sandboxed program out: an HTTP proxy that is the gateway's, for one call.

A program that heeds ``http_proxy`` and ``https_proxy`` asks it for a tunnel to a host of https
(``CONNECT``), or for an address of http. Both lead to listed hosts only, to addresses that tools
may be connected to, within the rates and the bytes of the call and of its tenant.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
from collections.abc import AsyncIterator, Iterable, Sequence

import aiohttp
import h11

from agentray.clock import Clock
from agentray.errors import ToolError
from agentray.telemetry.logging import get_logger
from agentray.tools.allowance import Bucket
from agentray.tools.exchange import Transfer
from agentray.tools.gateway import Gateway, unreached
from agentray.tools.hosts import HostRule, Origin, parse_url

__all__ = ["ForwardProxy", "forwarded", "tunnel_origin"]

log = get_logger(__name__)

_CHUNK_BYTES = 32 * 1024
_HEAD_BYTES = 16 * 1024
# What programs cost this process is in no quota of theirs: connections at once, and per second.
_PLACES = 16
_CONNECTIONS_PER_S, _CONNECTIONS_BURST = 50.0, 100.0
_PAUSE_S = 0.1
# A program that is refused may still be sending; it is to read why.
_LINGER_S, _LINGER_PARTS = 1.0, 64
_REASON_CHARS = 200
# On, and for no time: its end is a reset.
_RESET = struct.pack("ii", 1, 0)
_STATUS = {"refused": 403, "upstream": 502, "timeout": 504}
_TARGET = re.compile(r"[^/?#@\\]+:[0-9]{1,5}")
# Of one connection only (RFC 9110, 7.6.1), and what the next one has of its own.
_HOP = frozenset(
    {
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te"),
        *("proxy-connection", "trailer", "transfer-encoding", "upgrade", "host", "expect"),
    }
)
_AUTOMATIC = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")

Headers = Iterable[tuple[bytes, bytes]]


def tunnel_origin(target: str) -> Origin:
    """Return where ``CONNECT`` with this target leads.

    Raises:
        ToolError: it is no host and port.
    """
    if not _TARGET.fullmatch(target):
        raise ToolError("A tunnel needs HOST:PORT.", reason="refused")
    return parse_url(f"https://{target}/")[0]


def forwarded(headers: Headers) -> list[tuple[str, str]]:
    """Return the headers that go on to the other side, without those of one connection."""
    pairs = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in headers]
    named = {
        each.strip().lower()
        for name, value in pairs
        if name == "connection"
        for each in value.split(",")
    }
    dropped = (_HOP | named) - {"content-length"}
    if any(name == "transfer-encoding" for name, _ in pairs):
        # Which says where the body ends; this may say something else.
        dropped |= {"content-length"}
    return [(name, value) for name, value in pairs if name not in dropped]


class _Peer:
    """The program's end of a connection: one request, one answer."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=_HEAD_BYTES)
        self._method = b""

    @property
    def surplus(self) -> bytes:
        """What came after the request."""
        return self._http.trailing_data[0]

    async def event(self) -> object:
        """Return what comes next; raises ``h11.RemoteProtocolError``."""
        while True:
            event = self._http.next_event()
            if event is not h11.NEED_DATA:
                if isinstance(event, h11.Request):
                    self._method = event.method
                return event
            if self._http.they_are_waiting_for_100_continue:
                await self.send(h11.InformationalResponse(status_code=100, headers=[]))
            self._http.receive_data(await self.reader.read(_CHUNK_BYTES))

    async def send(self, event: h11.Event) -> None:
        """Send a part of the answer."""
        self.writer.write(self._http.send(event) or b"")
        await self.writer.drain()

    def cut(self) -> None:
        """End the connection, so that what is missing does not look like an end."""
        own = self.writer.get_extra_info("socket")
        with contextlib.suppress(OSError):
            own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.writer.transport.abort()

    async def refuse(self, status: int, problem: str) -> None:
        """Say why there is no answer; cut the connection where it has begun already."""
        if self._http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.cut()
            return
        text = problem.encode("ascii", "replace")[:_REASON_CHARS]
        body = text + b"\n"
        headers = [
            ("Content-Type", "text/plain"),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
        ]
        # In the status line too: of a tunnel's refusal most clients show nothing else.
        await self.send(h11.Response(status_code=status, reason=text, headers=headers))
        if self._method != b"HEAD":
            await self.send(h11.Data(data=body))
        await self.send(h11.EndOfMessage())
        self.writer.write_eof()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                for _ in range(_LINGER_PARTS):
                    if not await self.reader.read(_CHUNK_BYTES):
                        return


class ForwardProxy:
    """What one call of a tenant reaches, for as long as it runs."""

    def __init__(
        self, gateway: Gateway, rules: Sequence[HostRule], transfer: Transfer, clock: Clock
    ) -> None:
        self._gateway = gateway
        self._rules = rules
        self._transfer = transfer
        self._clock = clock
        self._session: aiohttp.ClientSession | None = None

    async def serve(self, listener: socket.socket) -> None:
        """Serve what connects to a listener, until it is cancelled: no connection is left then."""
        listener.setblocking(False)
        places = asyncio.Semaphore(_PLACES)
        bucket = Bucket(_CONNECTIONS_PER_S, _CONNECTIONS_BURST, self._clock.monotonic())
        try:
            async with asyncio.TaskGroup() as tasks:
                while True:
                    await places.acquire()
                    connection = await _accepted(listener)
                    task = tasks.create_task(self._connection(connection))
                    # It may be cancelled before it begins.
                    task.add_done_callback(
                        lambda _, own=connection: (own.close(), places.release())
                    )
                    if wait_s := bucket.take(1, self._clock.monotonic()):
                        await asyncio.sleep(wait_s)
        finally:
            if self._session is not None:
                await self._session.close()
                self._session = None

    async def _connection(self, connection: socket.socket) -> None:
        writer: asyncio.StreamWriter | None = None
        try:
            reader, writer = await asyncio.open_connection(sock=connection)
            await self._exchange(_Peer(reader, writer))
            writer.close()
            await writer.wait_closed()
        except OSError:
            # The program went away, or sent what it must not.
            pass
        except Exception as error:  # the outer wall: the others go on
            log.exception("proxy_failed", error=type(error).__name__)
        finally:
            if writer is not None:
                writer.transport.abort()

    async def _exchange(self, peer: _Peer) -> None:
        try:
            request = await peer.event()
            if not isinstance(request, h11.Request):
                return
            target = request.target.decode("ascii")
            if request.method == b"CONNECT":
                await self._tunnel(peer, target)
            else:
                await self._forward(peer, request, target)
        except ToolError as error:
            status = _STATUS.get(str(error.fields.get("reason")), 502)
            await peer.refuse(status, error.message)
        except h11.RemoteProtocolError as error:
            await peer.refuse(error.error_status_hint, str(error))
        except UnicodeDecodeError:
            await peer.refuse(400, "The address has characters that have to be encoded.")
        except h11.LocalProtocolError:
            await peer.refuse(502, "The host's answer cannot be passed on.")

    async def _tunnel(self, peer: _Peer, target: str) -> None:
        origin = tunnel_origin(target)
        await self._transfer.count(len(target))
        await self._gateway.admit(origin, self._rules, self._transfer)
        while not isinstance(await peer.event(), h11.EndOfMessage):
            pass
        reader, writer = await self._gateway.open_stream(origin)
        try:
            await peer.send(
                h11.Response(status_code=200, reason=b"Connection established", headers=[])
            )
            async with asyncio.TaskGroup() as both:
                both.create_task(self._relay(peer.reader, writer, peer.surplus))
                both.create_task(self._relay(reader, peer.writer))
            writer.close()
            await writer.wait_closed()
        except* (OSError, ToolError):
            peer.cut()
        finally:
            writer.transport.abort()

    async def _relay(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, part: bytes = b""
    ) -> None:
        part = part or await reader.read(_CHUNK_BYTES)
        while part:
            await self._transfer.count(len(part))
            writer.write(part)
            await writer.drain()
            part = await reader.read(_CHUNK_BYTES)
        writer.write_eof()

    async def _forward(self, peer: _Peer, request: h11.Request, target: str) -> None:
        origin, url = parse_url(target)
        if origin.scheme != "http":
            raise ToolError("This proxy tunnels https: ask it to CONNECT.", reason="refused")
        headers = forwarded(request.headers)
        await self._transfer.count(len(target) + sum(len(k) + len(v) for k, v in headers))
        await self._gateway.admit(origin, self._rules, self._transfer)
        sends = any(
            name in (b"content-length", b"transfer-encoding") for name, _ in request.headers
        )
        body = _Body(peer, self._transfer)
        if self._session is None:
            self._session = self._gateway.open_session()
        try:
            async with self._session.request(
                request.method.decode("ascii"),
                url,
                headers=headers,
                data=body.parts() if sends else None,
                allow_redirects=False,
                skip_auto_headers=_AUTOMATIC,
            ) as response:
                await self._answer(peer, response)
        except aiohttp.ClientError as error:
            raise (body.problem or unreached(origin, error)) from error

    async def _answer(self, peer: _Peer, response: aiohttp.ClientResponse) -> None:
        headers = forwarded(response.raw_headers)
        await self._transfer.count(sum(len(k) + len(v) for k, v in headers))
        reason = (response.reason or "").encode("latin-1", "replace")
        headers.append(("connection", "close"))
        await peer.send(h11.Response(status_code=response.status, reason=reason, headers=headers))
        async for part in response.content.iter_chunked(_CHUNK_BYTES):
            await self._transfer.count(len(part))
            await peer.send(h11.Data(data=part))
        await peer.send(h11.EndOfMessage())


class _Body:
    """A request's body on its way; ``problem`` is what ended it before its end."""

    def __init__(self, peer: _Peer, transfer: Transfer) -> None:
        self._peer = peer
        self._transfer = transfer
        self.problem: ToolError | None = None

    async def parts(self) -> AsyncIterator[bytes]:
        try:
            while isinstance(event := await self._peer.event(), h11.Data):
                await self._transfer.count(len(event.data))
                yield bytes(event.data)
        except ToolError as error:
            self.problem = error
            raise
        except h11.RemoteProtocolError as error:
            self.problem = ToolError(f"The request's body: {error}.", reason="refused")
            raise


async def _accepted(listener: socket.socket) -> socket.socket:
    while True:
        try:
            return (await asyncio.get_running_loop().sock_accept(listener))[0]
        except OSError:
            # Of the connection, which is gone, or of this process, which has no descriptor left.
            await asyncio.sleep(_PAUSE_S)
