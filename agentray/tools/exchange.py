"""One HTTP exchange of a tool: what is asked, what is read of the answer, what may be repeated."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC
from email.utils import parsedate_to_datetime

import aiohttp
import msgspec
from yarl import URL

from agentray.clock import Clock
from agentray.config.tool_settings import GatewaySettings
from agentray.errors import ToolError
from agentray.tools.allowance import Bucket, DailyBytes
from agentray.tools.hosts import Origin, parse_url, redirect_target
from agentray.tools.secrets import Secrets

__all__ = [
    "HttpReply",
    "HttpRequest",
    "Transfer",
    "header_problem",
    "may_repeat",
    "read_reply",
    "redirected",
    "retry_after_s",
]

_IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE"})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_PASSING = frozenset({502, 504})
_BUSY = frozenset({429, 503})
# What goes to another origin too; all else may be meant for the first one only.
_CROSSING = frozenset(
    {"accept", "accept-language", "content-type", "idempotency-key", "user-agent"}
)
_BODY_HEADERS = frozenset({"content-type", "content-length"})
# Set by the connection itself, or by nobody: a second one splits or hides a request.
_OWN_HEADERS = frozenset(
    {
        *("host", "content-length", "transfer-encoding", "connection", "upgrade", "te"),
        *("trailer", "expect", "keep-alive", "accept-encoding", "cookie"),
    }
)
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]*")
_TEXT = re.compile(
    r"text/.*|application/(.*[+])?(json|xml|yaml|javascript)|.*x-www-form-urlencoded"
)
# Not every codec of Python's is one of texts, or quick.
_CHARSET = re.compile(
    r"utf-?8|utf-?16([bl]e)?|(us-)?ascii|iso-8859-\d+|windows-\d+|gbk|big5|koi8-."
)
_CHUNK_BYTES = 16 * 1024
_MOST_SHOWN = 80


class HttpRequest(msgspec.Struct, frozen=True):
    """A request that is ready to be sent; its secrets are in it."""

    method: str
    url: str
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | None = None

    @property
    def idempotent(self) -> bool:
        return self.method in _IDEMPOTENT

    @property
    def size_bytes(self) -> int:
        """What the tool has put into it: address, headers and body."""
        headers = sum(len(name) + len(value.encode()) for name, value in self.headers)
        return len(self.method) + len(self.url) + headers + len(self.body or b"")


class HttpReply(msgspec.Struct, frozen=True):
    """An answer. ``text`` is its body without secrets, up to the bound; ``truncated``: there was
    more. ``retry_after_s`` is when the host wants to be asked again, None if it does not say."""

    status: int
    reason: str
    content_type: str
    text: str
    truncated: bool = False
    retry_after_s: float | None = None

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    @property
    def redirects(self) -> bool:
        return self.status in _REDIRECTS


class Transfer:
    """The bytes of one call, both ways, against the bounds and rates of call and tenant."""

    def __init__(
        self,
        tenant: str,
        settings: GatewaySettings,
        bucket: Bucket,
        daily: DailyBytes,
        clock: Clock,
        sleep: Callable[[float], Awaitable[None]],
        *,
        until: float,
    ) -> None:
        self.tenant = tenant
        self.until = until
        self.most_shown = settings.max_response_bytes
        self._left = settings.call_bytes
        rate = settings.call_bytes_per_s
        self._own = Bucket(rate, rate / 2, clock.monotonic())
        self._shared = bucket
        self._daily = daily
        self._clock = clock
        self._sleep = sleep

    async def count(self, size_bytes: int) -> None:
        """Count bytes that move, and wait until they may.

        Raises:
            ToolError: the call or the tenant has no more of them.
        """
        self._left -= size_bytes
        if self._left < 0:
            raise ToolError("The call moved more bytes than it may.", reason="refused")
        if self._daily.left(self.tenant, self._clock.now()) < size_bytes:
            raise ToolError("The bytes of this day are used up.", reason="refused")
        self._daily.add(self.tenant, size_bytes, self._clock.now())
        now = self._clock.monotonic()
        wait_s = max(self._own.take(size_bytes, now), self._shared.take(size_bytes, now))
        if wait_s:
            await self._sleep(wait_s)


def header_problem(headers: Iterable[tuple[str, str]]) -> str | None:
    """Return why headers cannot be sent, or None; the value is never shown."""
    for name, value in headers:
        if not _HEADER_NAME.fullmatch(name):
            return f"{name[:80]!r} is no name of a header."
        lowered = name.lower()
        if lowered in _OWN_HEADERS or lowered.startswith("proxy-"):
            return f"The header {name} is not for tools to set."
        if not _HEADER_VALUE.fullmatch(value):
            return f"The value of the header {name} has characters that cannot be in one."
    return None


def may_repeat(method: str, status: int, asked_after_s: float | None) -> bool:
    """Return whether a request that was answered so may help, and does no harm, once more."""
    if status in _BUSY:
        return method in _IDEMPOTENT or asked_after_s is not None
    return status in _PASSING and method in _IDEMPOTENT


def redirected(
    request: HttpRequest, origin: Origin, url: URL, status: int, location: str, secrets: Secrets
) -> HttpRequest:
    """Return the request that a redirect asks for, as browsers make it (Fetch, HTTP-redirect).

    Headers that may be meant for its origin only, and those with a secret, go to no other.

    Raises:
        ToolError: the address is refused.
    """
    target = redirect_target(url, location)
    there, _ = parse_url(target)
    method, headers, body = request.method, request.headers, request.body
    if (status == 303 and method != "HEAD") or (status in (301, 302) and method == "POST"):
        method, body = "GET", None
        headers = tuple(pair for pair in headers if pair[0].lower() not in _BODY_HEADERS)
    if there != origin:
        headers = tuple(
            (name, value)
            for name, value in headers
            if name.lower() in _CROSSING and not secrets.within(value)
        )
    return HttpRequest(method, target, headers, body)


def retry_after_s(value: str | None, now: float) -> float | None:
    """Return what a ``Retry-After`` means in seconds from ``now``, or None if it means nothing."""
    if value is None:
        return None
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        at = parsedate_to_datetime(value)
    except (TypeError, ValueError, IndexError, OverflowError):
        return None
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    return max(0.0, at.timestamp() - now)


async def read_reply(
    response: aiohttp.ClientResponse, transfer: Transfer, secrets: Secrets, now: float
) -> HttpReply:
    """Read an answer up to the bound; the rest is not fetched.

    Raises:
        ToolError: it is in an encoding that was not asked for, or it has more bytes than it may.
    """
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    body = bytearray()
    truncated = False
    await transfer.count(sum(len(key) + len(value) for key, value in response.raw_headers))
    if encoding in ("", "identity"):
        async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
            await transfer.count(len(chunk))
            body += chunk
            if len(body) > transfer.most_shown:
                truncated = True
                break
    elif response.method != "HEAD" and 200 <= response.status < 300:
        raise ToolError(
            "The host answered in an encoding that was not asked for.", reason="upstream"
        )
    if truncated:
        # What was read and is not shown must not come back through a kept connection.
        response.close()
    content_type = response.headers.get("Content-Type", "")
    text = _text(bytes(body[: transfer.most_shown]), content_type, response.charset)
    return HttpReply(
        status=response.status,
        # What is cut first may end in a secret's beginning.
        reason=secrets.redact(response.reason or "")[:_MOST_SHOWN],
        content_type=secrets.redact(content_type)[:_MOST_SHOWN],
        text=secrets.redact(text, cut=truncated),
        truncated=truncated,
        retry_after_s=retry_after_s(response.headers.get("Retry-After"), now),
    )


def _text(body: bytes, content_type: str, charset: str | None) -> str:
    kind = content_type.partition(";")[0].strip().lower()
    if not kind or _TEXT.fullmatch(kind):
        codec = (charset or "utf-8").lower()
        with contextlib.suppress(LookupError):
            return body.decode(codec if _CHARSET.fullmatch(codec) else "utf-8", errors="replace")
    try:
        return body.decode()
    except UnicodeDecodeError:
        return f"({len(body)} bytes of {kind}, not shown)"
