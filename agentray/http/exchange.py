"""One request and its reply, over ASGI, without what a framework would add."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Protocol, TypeVar
from urllib.parse import parse_qsl

import msgspec
from starlette.types import Receive, Scope, Send

from agentray.errors import InvalidRequestError
from agentray.http.errors import BodyTooLargeError, validation_error
from agentray.telemetry.logging import get_logger

__all__ = ["ClientGoneError", "Exchange", "Header", "check_idempotency_key"]

log = get_logger(__name__)

Header = tuple[bytes, bytes]
T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")

_JSON: Header = (b"content-type", b"application/json")
_PIECE_BYTES = 64 * 1024
_DISCARD_S = 10.0
_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_encode = msgspec.json.Encoder().encode


class Decoder(Protocol[T_co]):
    """What msgspec's decoders are here."""

    def decode(self, buf: bytes, /) -> T_co: ...


class ClientGoneError(ConnectionError):
    """The client left before its request was whole, or takes no answer: nobody to answer."""


class Exchange:
    """A request, and where its reply goes.

    ``stall_s`` is how long the client of a large reply may take nothing of it.
    """

    __slots__ = ("_headers", "_stall_s", "params", "raw", "receive", "scope", "send", "started")

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, *, stall_s: float | None = None
    ) -> None:
        self.scope = scope
        self.receive = receive
        self.send = send
        self.params: Sequence[str] = ()
        self.raw = b""
        self.started = False
        self._stall_s = stall_s
        self._headers: list[Header] = scope["headers"]

    def header(self, name: bytes) -> str | None:
        """Return a header by its name in lower case."""
        for key, value in self._headers:
            if key == name:
                return value.decode("latin-1")
        return None

    async def body(self, limit_bytes: int) -> bytes:
        """Return the body.

        Raises:
            BodyTooLargeError: it is larger than ``limit_bytes``; no more than that is kept.
            ClientGoneError: the client left.
        """
        await self._check_length(limit_bytes)
        message = await self.receive()
        body: bytes = message.get("body", b"")
        if message.get("more_body", False):
            parts, size = [body], len(body)
            while message.get("more_body", False):
                message = await self.receive()
                part: bytes = message.get("body", b"")
                parts.append(part)
                size += len(part)
                if size > limit_bytes:
                    if message.get("more_body", False):
                        await self._discard(limit_bytes)
                    raise _too_large(limit_bytes)
            body = b"".join(parts)
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        if len(body) > limit_bytes:
            raise _too_large(limit_bytes)
        self.raw = body
        return body

    async def pieces(self, limit_bytes: int) -> AsyncGenerator[bytes]:
        """Yield the body piece by piece, as it comes. Raises as :meth:`body` does."""
        await self._check_length(limit_bytes)
        size, more = 0, True
        while more:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            piece: bytes = message.get("body", b"")
            more = message.get("more_body", False)
            size += len(piece)
            if size > limit_bytes:
                if more:
                    await self._discard(limit_bytes)
                raise _too_large(limit_bytes)
            yield piece

    async def _check_length(self, limit_bytes: int) -> None:
        """Refuse a body that says itself that it is too large."""
        declared = self.header(b"content-length")
        if declared is not None and declared.isdecimal() and int(declared) > limit_bytes:
            if self.header(b"expect") is None:
                await self._discard(limit_bytes)
            raise _too_large(limit_bytes)

    async def _discard(self, limit_bytes: int) -> None:
        """Read the rest of a body that is too large, if that is soon done: a connection that is
        closed in the middle of a request loses the answer, or the next request."""
        left = 4 * limit_bytes
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DISCARD_S):
                while left > 0:
                    message = await self.receive()
                    left -= len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return

    async def decode(self, decoder: Decoder[T], limit_bytes: int, *, openai: bool = False) -> T:
        """Return the body as the decoder's type; an empty one counts as ``{}``.

        Raises:
            InvalidRequestError: it is not JSON, or not of that type; with the ``param``.
        """
        body = await self.body(limit_bytes)
        try:
            return decoder.decode(body or b"{}")
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise validation_error(error, openai=openai) from error

    def query(self, kind: type[T]) -> T:
        """Return the query string as a struct; of a repeated name the last value.

        Raises:
            InvalidRequestError: it does not fit the struct.
        """
        raw: bytes = self.scope["query_string"]
        pairs = dict(parse_qsl(raw.decode("latin-1"), keep_blank_values=True)) if raw else {}
        try:
            return msgspec.convert(pairs, kind, strict=False)
        except msgspec.ValidationError as error:
            raise validation_error(error) from error

    def idempotency_key(self) -> str | None:
        """Return the ``Idempotency-Key`` header.

        Raises:
            InvalidRequestError: it is not 1 to 255 printable ASCII characters without spaces.
        """
        key = self.header(b"idempotency-key")
        return None if key is None else check_idempotency_key(key)

    async def reply(
        self, payload: Any, *, status: int = 200, headers: Sequence[Header] = ()
    ) -> None:
        """Send an object as JSON."""
        await self.reply_bytes(_encode(payload), _JSON, status=status, headers=headers)

    async def reply_bytes(
        self,
        body: bytes,
        content_type: Header,
        *,
        status: int = 200,
        headers: Sequence[Header] = (),
    ) -> None:
        """Send bytes that are ready.

        Raises:
            ClientGoneError: the client takes nothing; its connection is closed.
        """
        self.started = True
        length = (b"content-length", b"%d" % len(body))
        await self.send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [content_type, length, *headers],
            }
        )
        at = 0
        # The server takes in whatever it is given at once, and waits for room only then. What is
        # small enough to be forgotten there costs no timer.
        while len(body) - at > _PIECE_BYTES:
            await self._send_piece(body[at : at + _PIECE_BYTES], more=True)
            at += _PIECE_BYTES
        if at:
            await self._send_piece(body[at:], more=False)
        else:
            await self.send({"type": "http.response.body", "body": body})

    async def reply_pieces(
        self, pieces: AsyncGenerator[bytes], size_bytes: int, content_type: Header
    ) -> None:
        """Send a large body piece by piece, as it comes.

        Raises:
            ClientGoneError: the client takes nothing, or the pieces are not as large together as
                was said; its connection is closed.
        """
        self.started = True
        length = (b"content-length", b"%d" % size_bytes)
        await self.send(
            {"type": "http.response.start", "status": 200, "headers": [content_type, length]}
        )
        left = size_bytes
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                left -= len(piece)
                if left < 0:
                    break
                await self._send_piece(piece, more=True)
        if left:
            # Half a body cannot become an error: only the closed connection tells it.
            log.warning("reply_dropped", reason="incomplete")
            self.abort()
            raise ClientGoneError
        await self.send({"type": "http.response.body", "body": b""})

    async def _send_piece(self, piece: bytes, *, more: bool) -> None:
        try:
            async with asyncio.timeout(self._stall_s):
                await self.send({"type": "http.response.body", "body": piece, "more_body": more})
        except TimeoutError as error:
            log.info("reply_dropped", reason="slow_reader")
            self.abort()
            raise ClientGoneError from error

    @property
    def gone(self) -> bool:
        """Whether the client is known to have left: what is sent then goes nowhere, silently."""
        # ASGI tells it only to who waits for it. As in abort: uvicorn's send is a method.
        return bool(getattr(getattr(self.send, "__self__", None), "disconnected", False))

    def abort(self) -> None:
        """Close the connection at once, without what the client has not taken yet."""
        # ASGI has no word for that, and a close waits for the client: for hours, if it must.
        # uvicorn's send is a method of the object that holds the connection.
        transport: Any = getattr(getattr(self.send, "__self__", None), "transport", None)
        if transport is not None:
            transport.abort()


def check_idempotency_key(key: str) -> str:
    """Return the key if it can be one; raise ``InvalidRequestError`` if not."""
    if not _KEY.fullmatch(key):
        raise InvalidRequestError(
            "an idempotency key is 1 to 255 printable ASCII characters without spaces",
            param="idempotency_key",
        )
    return key


def _too_large(limit_bytes: int) -> BodyTooLargeError:
    return BodyTooLargeError(
        f"the body is larger than {limit_bytes} bytes", limit_bytes=limit_bytes
    )
