"""Carry the messages of the tool pool: frames over connections that begin with a token.

Ray starts the actors and says where they listen; calls go over connections of their own, because
a Ray call costs about a millisecond of the caller's CPU and a frame a twentieth of that. A frame
is its length in four bytes and a message in MessagePack. The first one of a connection shows the
listener's token; before that nothing long is read.
"""

from __future__ import annotations

import asyncio
import hmac
import socket
from collections.abc import Callable
from typing import Any, Protocol, cast

import msgspec

from agentray.telemetry.logging import get_logger
from agentray.tools.messages import Hello, Message

__all__ = ["MAX_FRAME", "Link", "Listener", "connect", "listen"]

log = get_logger(__name__)

# Scratch and result of a call are far below this; what is longer is no message of ours.
MAX_FRAME = 192 * 1024 * 1024
_MAX_HELLO = 4096
_HELLO_S = 10.0
# What a peer does not take is kept for it up to this.
_MAX_UNSENT = 256 * 1024 * 1024

# A machine that vanished says nothing: asked after 5 s, it is given up after 15.
_SOCKET_OPTIONS = [
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *(
        (socket.IPPROTO_TCP, getattr(socket, name), value)
        for name, value in (
            *(("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 3), ("TCP_KEEPCNT", 3)),
            ("TCP_USER_TIMEOUT", 15_000),
        )
        if hasattr(socket, name)
    ),
]

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


class Listener(Protocol):
    """What becomes of a connection's messages; called in the event loop, and must not block."""

    def opened(self, link: Link, hello: Hello) -> None: ...

    def received(self, link: Link, message: Any) -> None: ...

    def closed(self, link: Link) -> None: ...


class Link(asyncio.Protocol):
    """One end of a connection. ``send`` gathers what is sent in one pass of the loop."""

    def __init__(self, listener: Listener, *, token: str, hello: Hello | None = None) -> None:
        self._listener = listener
        self._token = token
        self._hello = hello
        self._open = hello is not None
        self._transport: asyncio.Transport | None = None
        self._read = bytearray()
        self._unsent: list[bytes] = []
        self._loop = asyncio.get_running_loop()
        self._impatience: asyncio.TimerHandle | None = None
        self.name = ""

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, message: Message) -> None:
        """Send a message, if the connection is still there."""
        if self._transport is None:
            return
        body = _encoder.encode(message)
        if not self._unsent:
            self._loop.call_soon(self._flush)
        self._unsent.append(len(body).to_bytes(4, "big"))
        self._unsent.append(body)

    def close(self) -> None:
        """Send what is left and close."""
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    def _flush(self) -> None:
        if self._unsent and self._transport is not None:
            self._transport.write(b"".join(self._unsent))
            if self._transport.get_write_buffer_size() > _MAX_UNSENT:
                log.warning("tool_peer_too_slow", peer=self.name)
                self._transport.abort()
        self._unsent.clear()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclass of asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        sock: socket.socket | None = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            for level, name, value in _SOCKET_OPTIONS:
                sock.setsockopt(level, name, value)
        if self._hello is not None:
            self.send(self._hello)
        else:
            self._impatience = self._loop.call_later(_HELLO_S, self.abort)

    def data_received(self, data: bytes) -> None:
        read = self._read
        read += data
        at, most = 0, MAX_FRAME if self._open else _MAX_HELLO
        while len(read) - at >= 4:
            size = int.from_bytes(read[at : at + 4], "big")
            if size > most:
                log.warning("tool_frame_refused", peer=self.name, size_bytes=size)
                self.abort()
                return
            if len(read) - at - 4 < size:
                break
            body = bytes(memoryview(read)[at + 4 : at + 4 + size])
            at += 4 + size
            if not self._take(body):
                self.abort()
                return
            most = MAX_FRAME
        del read[:at]

    def _take(self, body: bytes) -> bool:
        try:
            message = _decoder.decode(body)
        except (msgspec.MsgspecError, ValueError):
            log.warning("tool_message_refused", peer=self.name)
            return False
        if self._open:
            self._listener.received(self, message)
            return True
        shown = isinstance(message, Hello) and hmac.compare_digest(
            message.token.encode(), self._token.encode()
        )
        if not isinstance(message, Hello) or not shown:
            log.warning("tool_peer_refused")
            return False
        if self._impatience is not None:
            self._impatience.cancel()
        self._open, self.name = True, message.name
        self._listener.opened(self, message)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._impatience is not None:
            self._impatience.cancel()
        if self._open:
            self._listener.closed(self)


async def listen(listener: Listener, host: str, token: str) -> tuple[asyncio.Server, int]:
    """Listen at a free port of an address; return the server and the port."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Link(listener, token=token), host, 0)
    return server, server.sockets[0].getsockname()[1]


async def connect(
    listener: Listener, host: str, port: int, *, token: str, name: str, timeout_s: float
) -> Link:
    """Connect and show the token.

    Raises:
        OSError: if nobody listens there, ``TimeoutError`` included.
    """
    loop = asyncio.get_running_loop()
    make: Callable[[], Link] = lambda: Link(listener, token="", hello=Hello(token, name))  # noqa: E731
    async with asyncio.timeout(timeout_s):
        _, link = await loop.create_connection(make, host, port)
    if not link.is_open:
        # Its end was told before anybody could know of it.
        raise ConnectionResetError(f"{host}:{port} closed the connection at once")
    return link
