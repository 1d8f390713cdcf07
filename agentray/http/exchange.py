"""One request and its reply, over ASGI, without what a framework would add."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar
from urllib.parse import parse_qsl

import msgspec
from starlette.types import Receive, Scope, Send

from agentray.errors import InvalidRequestError
from agentray.http.errors import BodyTooLargeError, validation_error

__all__ = ["ClientGoneError", "Exchange", "Header", "check_idempotency_key"]

Header = tuple[bytes, bytes]
T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")

_JSON: Header = (b"content-type", b"application/json")
_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_encode = msgspec.json.Encoder().encode


class Decoder(Protocol[T_co]):
    """What msgspec's decoders are here."""

    def decode(self, buf: bytes, /) -> T_co: ...


class ClientGoneError(ConnectionError):
    """The client left before its request was whole: there is nobody to answer."""


class Exchange:
    """A request, and where its reply goes."""

    __slots__ = ("_headers", "params", "raw", "receive", "scope", "send", "started")

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.receive = receive
        self.send = send
        self.params: Sequence[str] = ()
        self.raw = b""
        self.started = False
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
        declared = self.header(b"content-length")
        if declared is not None and declared.isdecimal() and int(declared) > limit_bytes:
            raise _too_large(limit_bytes)
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
                    break
            body = b"".join(parts)
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        if len(body) > limit_bytes:
            raise _too_large(limit_bytes)
        self.raw = body
        return body

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
        """Send bytes that are ready."""
        self.started = True
        length = (b"content-length", b"%d" % len(body))
        await self.send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [content_type, length, *headers],
            }
        )
        await self.send({"type": "http.response.body", "body": body})

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
