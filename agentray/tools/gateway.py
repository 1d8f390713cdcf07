"""Let tools' HTTP requests out: to allowed hosts and public addresses, within rates and caps."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Protocol

import aiohttp
from yarl import URL

from agentray.clock import Clock
from agentray.config.tool_settings import GatewaySettings
from agentray.errors import ToolError
from agentray.tools.addresses import address_problem
from agentray.tools.allowance import DailyBytes, TenantBuckets
from agentray.tools.egress import AddressRefusedError, Lookup, look_up, open_egress, open_stream
from agentray.tools.exchange import (
    HttpReply,
    HttpRequest,
    Transfer,
    header_problem,
    may_repeat,
    read_reply,
    redirected,
)
from agentray.tools.hosts import HostRule, Origin, allowed, host_rule, is_address, parse_url
from agentray.tools.secrets import Secrets

__all__ = ["BreakerLike", "Gateway", "unreached"]

_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 5.0
_LONGEST_GATE_S = 300.0
_MOST_BREAKERS = 1_000
_LOOKUPS = 2
# A compressed answer could become one of any size.
_UNCOMPRESSED = ("Accept-Encoding", "identity")


def unreached(origin: Origin, error: OSError | aiohttp.ClientError) -> ToolError:
    """Return what is said of a host that could not be connected to."""
    if isinstance(refusal := getattr(error, "os_error", error), AddressRefusedError):
        return ToolError(f"The address of {origin} {refusal}.", reason="refused")
    problem = f"{origin} could not be reached ({type(error).__name__})."
    return ToolError(problem, reason="upstream")


class BreakerLike(Protocol):
    """What the gateway has to know of a host's breaker; see ``agentray.models.breaker``."""

    @property
    def opened(self) -> bool: ...
    def wait_s(self, now: float) -> float: ...
    def begun(self) -> bool: ...
    def succeeded(self, now: float, *, probe: bool) -> None: ...
    def failed(self, now: float, reason: str, *, probe: bool) -> None: ...
    def limited(self, now: float, retry_after_s: float, *, probe: bool) -> None: ...
    def left(self, *, probe: bool) -> None: ...


class _LostError(Exception):
    """A request brought no whole answer; ``sent`` says that the host may have acted on it."""

    def __init__(self, problem: str, *, sent: bool) -> None:
        super().__init__(problem)
        self.sent = sent


class Gateway:
    """The way out of one process; nothing is opened before the first request.

    ``hosts`` are those of the configured tools. ``share`` is the part of the rates and daily bounds
    that this process has: with eight workers an eighth.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        *,
        hosts: Iterable[HostRule],
        secrets: Secrets,
        breaker: Callable[[str], BreakerLike],
        clock: Clock,
        share: float = 1.0,
        lookup: Lookup = look_up,
        jitter: Callable[[], float] = random.random,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._settings = settings
        self._named = tuple(map(host_rule, settings.allow))
        self._rules = (*hosts, *self._named)
        self._private = tuple(map(host_rule, settings.allow_private))
        self._secrets = secrets
        self._new_breaker = breaker
        # Of a tenant and an origin: nobody can have a host closed to others by making it fail.
        self._breakers: dict[tuple[str, str], BreakerLike] = {}
        self._clock = clock
        self._lookup = lookup
        self._jitter = jitter
        self._sleep = sleep
        bytes_per_s = settings.tenant_bytes_per_s * share
        self._bytes = TenantBuckets(bytes_per_s, bytes_per_s)
        self._requests = TenantBuckets(
            settings.requests_per_s * share, max(1.0, settings.burst * share)
        )
        self._daily = DailyBytes(settings.tenant_bytes_per_day * share)
        self._session: aiohttp.ClientSession | None = None
        self._lookups = asyncio.Semaphore(_LOOKUPS)

    async def send(self, request: HttpRequest, *, tenant: str, timeout_s: float) -> HttpReply:
        """Return the last answer to a request, whatever its status, with secrets taken out.

        It is repeated with growing pauses while that may help and does no harm: when the host was
        not reached, after 429 and 503 with ``Retry-After``, and for idempotent methods when the
        answer was lost or is 429, 502, 503 or 504. Redirects are followed, each as a request of
        its own, without ``Authorization`` and other headers of the tool to another origin.

        Raises:
            ToolError: there is no answer. Its reason is ``refused``, ``timeout`` or ``upstream``.
        """
        transfer = self.transfer(tenant, timeout_s)
        limit = asyncio.timeout(timeout_s)
        try:
            async with limit:
                return await self._attempts(request, transfer)
        except ToolError as error:
            raise ToolError(self._secrets.redact(error.message), **error.fields) from None
        except TimeoutError as error:
            if not limit.expired():
                raise
            problem = f"There was no whole answer within {timeout_s:g} s."
            raise ToolError(problem, reason="timeout") from error

    async def admit(self, origin: Origin, rules: Iterable[HostRule], transfer: Transfer) -> None:
        """See that one of the rules fits where a program wants to, and wait for its turn there.

        Raises:
            ToolError: it is refused.
        """
        self._check(origin, rules)
        await self._wait_for_turn(origin, transfer)

    async def open_stream(
        self, origin: Origin
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect a program to where it was admitted.

        Raises:
            ToolError: it is refused, or does not answer.
        """
        try:
            return await open_stream(
                origin.host,
                origin.port,
                private=self._may_be_private(origin.host, origin.port),
                connect_timeout_s=self._settings.connect_timeout_s,
                lookup=self._look_up_for_program,
            )
        except OSError as error:
            raise unreached(origin, error) from error

    def open_session(self) -> aiohttp.ClientSession:
        """Return a session of a program's own: no other waits for its connections."""
        return open_egress(
            self._may_be_private,
            connect_timeout_s=self._settings.connect_timeout_s,
            lookup=self._look_up_for_program,
        )

    async def _look_up_for_program(self, host: str, port: int) -> Sequence[str]:
        # Those that a program has looked up may be slow on purpose, and threads are few.
        async with self._lookups:
            return await self._lookup(host, port)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    def transfer(self, tenant: str, timeout_s: float) -> Transfer:
        """Return what counts the bytes of a call that begins now."""
        return Transfer(
            tenant,
            self._settings,
            self._bytes.get((tenant,), self._clock.monotonic()),
            self._daily,
            self._clock,
            self._sleep,
            until=self._clock.monotonic() + timeout_s,
        )

    async def _attempts(self, request: HttpRequest, transfer: Transfer) -> HttpReply:
        if (problem := header_problem(request.headers)) is not None:
            raise ToolError(problem, reason="refused")
        attempt = 0
        while True:
            attempt += 1
            reply: HttpReply | None = None
            lost: _LostError | None = None
            try:
                reply = await self._follow(request, transfer)
                again = may_repeat(request.method, reply.status, reply.retry_after_s)
                pause_s = reply.retry_after_s or 0.0
            except _LostError as error:
                lost = error
                again = request.idempotent or not error.sent
                pause_s = 0.0
            pause_s = max(pause_s, self._backoff_s(attempt))
            late = self._clock.monotonic() + pause_s >= transfer.until
            if not again or late or attempt >= self._settings.attempts:
                if reply is not None:
                    return reply
                raise ToolError(f"{lost}.", reason="upstream") from lost
            await self._sleep(pause_s)

    def _backoff_s(self, attempt: int) -> float:
        most = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** (attempt - 1))
        # Half of it at least: those who failed together shall not come back together.
        return most * (0.5 + self._jitter() / 2)

    async def _follow(self, request: HttpRequest, transfer: Transfer) -> HttpReply:
        own, _ = parse_url(request.url)
        for _ in range(self._settings.max_redirects + 1):
            if request.size_bytes > (most := self._settings.max_request_bytes):
                raise ToolError(f"The request has more than {most} bytes.", reason="refused")
            origin, url = parse_url(request.url)
            self._check(origin, self._rules)
            if origin != own:
                self._check_crossing(origin)
            await self._wait_for_turn(origin, transfer)
            reply, location = await self._once(request, origin, url, transfer)
            if location is None:
                return reply
            request = redirected(request, origin, url, reply.status, location, self._secrets)
        most = self._settings.max_redirects
        raise ToolError(f"The host redirects more than {most} times.", reason="upstream")

    def _check(self, origin: Origin, rules: Iterable[HostRule]) -> None:
        if not allowed(origin, rules):
            problem = f"{origin} is no host that may be called from here."
            raise ToolError(problem, reason="refused")
        if is_address(origin.host):
            # The connector looks nothing up, so its resolver sees no such host.
            private = self._may_be_private(origin.host, origin.port)
            if (problem := address_problem(origin.host, private=private)) is not None:
                raise ToolError(f"{origin} {problem}.", reason="refused")

    def _check_crossing(self, origin: Origin) -> None:
        # A public API, or what speaks for it, is not to choose what a private service is asked:
        # that another tool may call it was not said of this one.
        if self._may_be_private(origin.host, origin.port) and not allowed(origin, self._named):
            problem = f"{origin} may be private: tools.gateway.allow does not let redirects there."
            raise ToolError(problem, reason="refused")

    def _may_be_private(self, host: str, port: int) -> bool:
        return any(rule.fits(Origin(rule.origin.scheme, host, port)) for rule in self._private)

    async def _wait_for_turn(self, origin: Origin, transfer: Transfer) -> None:
        now = self._clock.monotonic()
        bucket = self._requests.get((transfer.tenant, str(origin)), now)
        wait_s = bucket.take(1, now)
        if wait_s > _LONGEST_PAUSE_S or now + wait_s >= transfer.until:
            bucket.give_back(1, now)
            problem = f"Too many requests to {origin}: try again in {wait_s:.0f} s."
            raise ToolError(problem, reason="refused")
        if wait_s:
            await self._sleep(wait_s)

    async def _ask_breaker(self, origin: Origin, transfer: Transfer) -> BreakerLike:
        key = (transfer.tenant, str(origin))
        breaker = self._breakers.get(key)
        if breaker is None:
            if len(self._breakers) >= _MOST_BREAKERS:
                self._breakers = {key: one for key, one in self._breakers.items() if one.opened}
            breaker = self._breakers[key] = self._new_breaker(str(origin))
        now = self._clock.monotonic()
        if wait_s := breaker.wait_s(now):
            if breaker.opened or wait_s > _LONGEST_PAUSE_S or now + wait_s >= transfer.until:
                problem = f"{origin} failed or is busy: it is left alone for {wait_s:.0f} s."
                raise ToolError(problem, reason="upstream", retry_after_s=wait_s)
            await self._sleep(wait_s)
        return breaker

    async def _once(
        self, request: HttpRequest, origin: Origin, url: URL, transfer: Transfer
    ) -> tuple[HttpReply, str | None]:
        """Make one request; return its answer, and where it redirects to."""
        breaker = await self._ask_breaker(origin, transfer)
        probe = breaker.begun()
        answered = False
        try:
            await transfer.count(request.size_bytes)
            async with self._opened().request(
                request.method,
                url,
                headers=[*request.headers, _UNCOMPRESSED],
                data=request.body,
                allow_redirects=False,
            ) as response:
                answered = True
                reply = await read_reply(response, transfer, self._secrets, self._clock.now())
                location = response.headers.get("Location")
        except (aiohttp.ClientError, OSError) as error:
            if isinstance(getattr(error, "os_error", error), AddressRefusedError):
                breaker.left(probe=probe)
                problem = f"The address of {origin} {getattr(error, 'os_error', error)}."
                raise ToolError(problem, reason="refused") from error
            reason = type(error).__name__
            breaker.failed(self._clock.monotonic(), reason, probe=probe)
            sent = not isinstance(
                error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError
            )
            said = f"{origin} gave no whole answer" if sent else f"{origin} could not be reached"
            raise _LostError(f"{said} ({reason})", sent=sent) from error
        except BaseException:
            now = self._clock.monotonic()
            if not answered and now >= transfer.until:
                breaker.failed(now, "timeout", probe=probe)
            else:
                breaker.left(probe=probe)
            raise
        self._tell(breaker, reply, probe=probe)
        return reply, location if reply.redirects else None

    def _tell(self, breaker: BreakerLike, reply: HttpReply, *, probe: bool) -> None:
        now = self._clock.monotonic()
        if reply.status == 429:
            wait_s = min(_LONGEST_GATE_S, reply.retry_after_s or 0.0)
            breaker.limited(now, wait_s, probe=probe)
        elif reply.status >= 500:
            breaker.failed(now, f"answered {reply.status}", probe=probe)
        else:
            breaker.succeeded(now, probe=probe)

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = open_egress(
                self._may_be_private,
                connect_timeout_s=self._settings.connect_timeout_s,
                lookup=self._lookup,
            )
        return self._session
