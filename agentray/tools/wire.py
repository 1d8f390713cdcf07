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
from collections import deque
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
# What is sent in one pass of the loop is gathered up to this.
_GATHERED_BYTES = 256 * 1024
# More is not given to the socket before the peer has taken some: eight slots may send 64 MiB each,
# and what waits as a message takes no memory that its result does not take anyway.
_MAX_BUFFERED = 4 * 1024 * 1024
# A peer that takes nothing for so long is given up, and one that leaves so many messages.
_STALLED_S = 15.0
_MAX_WAITING = 200_000
# Time is counted in looks at it: a process that was paused has not waited for its peers.
_LOOKS = 5

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
    """One end of a connection.

    ``send`` gathers what is sent in one pass of the loop, and keeps its order. While the peer does
    not take what was sent, messages wait here, unencoded.
    """

    def __init__(self, listener: Listener, *, token: str, hello: Hello | None = None) -> None:
        self._listener = listener
        self._token = token
        self._hello = hello
        self._open = hello is not None
        self._transport: asyncio.Transport | None = None
        self._read = bytearray()
        self._unsent: list[bytes] = []
        self._unsent_bytes = 0
        self._waiting: deque[Message] = deque()
        self._paused = False
        self._loop = asyncio.get_running_loop()
        self._impatience: asyncio.TimerHandle | None = None
        self._watches: dict[str, asyncio.TimerHandle] = {}
        self._messages = 0
        self.name = ""

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    @property
    def has_spoken(self) -> bool:
        """Whether the peer has said anything but its token."""
        return self._messages > 0

    def send(self, message: Message) -> None:
        """Send a message, if the connection is still there."""
        if self._transport is None:
            return
        if not self._paused and not self._waiting:
            self._gather(message)
        elif len(self._waiting) < _MAX_WAITING:
            self._waiting.append(message)
        else:
            log.warning("tool_peer_too_slow", peer=self.name)
            self.abort()

    def expect(self, silent_s: float, on_silence: Callable[[], None]) -> None:
        """Call ``on_silence``, once, when the peer has said nothing for so long."""
        self._watch("silence", silent_s, lambda: self._messages, on_silence)

    def close(self) -> None:
        """Send what is left and close."""
        while self._waiting:
            self._gather(self._waiting.popleft())
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    def _gather(self, message: Message) -> None:
        body = _encoder.encode(message)
        if not self._unsent:
            self._loop.call_soon(self._flush)
        self._unsent += (len(body).to_bytes(4, "big"), body)
        self._unsent_bytes += 4 + len(body)
        if self._unsent_bytes >= _GATHERED_BYTES:
            self._flush()

    def _flush(self) -> None:
        unsent, self._unsent, size = self._unsent, [], self._unsent_bytes
        self._unsent_bytes = 0
        # What is large is not copied for the sake of fewer writes.
        for part in unsent if size > _GATHERED_BYTES else filter(None, [b"".join(unsent)]):
            if self._transport is not None:
                self._transport.write(part)

    def pause_writing(self) -> None:
        self._paused = True
        transport = self._transport
        assert transport is not None
        self._watch("stall", _STALLED_S, transport.get_write_buffer_size, self._stalled)

    def resume_writing(self) -> None:
        self._paused = False
        self._unwatch("stall")
        while self._waiting and not self._paused:
            try:
                # More than a little of it pauses again.
                self._gather(self._waiting.popleft())
            except ValueError:
                # Nobody is there to be told: as if the connection had been lost.
                log.exception("tool_message_not_sent", peer=self.name)
                self.abort()
                return

    def _stalled(self) -> None:
        log.warning("tool_peer_too_slow", peer=self.name)
        self.abort()

    def _watch(
        self, what: str, after_s: float, state: Callable[[], int], then: Callable[[], None]
    ) -> None:
        """Call ``then`` when ``state`` has stayed as it is for so long."""

        def look(before: int, left: int) -> None:
            now = state()
            if now != before:
                left = _LOOKS
            if left:
                self._watches[what] = self._loop.call_later(after_s / _LOOKS, look, now, left - 1)
            else:
                then()

        self._unwatch(what)
        look(state(), _LOOKS)

    def _unwatch(self, what: str) -> None:
        if (watch := self._watches.pop(what, None)) is not None:
            watch.cancel()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclass of asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=_MAX_BUFFERED)
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
            self._messages += 1
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
        self._unsent.clear()
        self._waiting.clear()
        if self._impatience is not None:
            self._impatience.cancel()
        for what in list(self._watches):
            self._unwatch(what)
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
