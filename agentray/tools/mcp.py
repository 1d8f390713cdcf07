"""Offer the tools of MCP servers: start each when it is needed, and again when it has died."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol, cast

from agentray.clock import Clock, SystemClock
from agentray.config.settings import McpSettings
from agentray.errors import ConfigError, ToolError
from agentray.telemetry.logging import get_logger
from agentray.tools.egress import Lookup, look_up
from agentray.tools.mcp_launch import Launcher
from agentray.tools.mcp_tools import Listed, Offer, offers_of, server_prefix
from agentray.tools.sandbox.base import Limits
from agentray.tools.spec import ToolContext, ToolSpec

__all__ = ["Changed", "Launchers", "McpServers"]

log = get_logger(__name__)

Run = Callable[[dict[str, Any], ToolContext], Awaitable[str]]
Changed = Callable[[list[ToolSpec], tuple[str, ...]], None]
"""Is told a server's tools and the names of those that they take the place of."""

Launchers = Callable[[McpSettings], Launcher | None]
"""Returns what starts a server's command in the `sandbox` that its settings ask for, if it can."""

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 60.0
# A server that lived so long is one that works: its next death is its first.
_LIVED_S = 60.0
_CALLS_PER_PLACE = 16
_SLACK_S = 5.0


class _Connected(Protocol):
    @property
    def alive(self) -> bool: ...

    async def run(self, listed: Callable[[Sequence[Listed]], None]) -> None: ...

    async def call(self, tool: str, arguments: dict[str, Any]) -> str: ...


Connect = Callable[[str, McpSettings], _Connected]
SchemaProblem = Callable[[dict[str, Any]], str | None]


class McpServers:
    """The configured servers, one connection each in a process.

    ``changed`` is told the tools of a server whenever it has listed them. ``schema_problem``
    returns why a JSON schema cannot be used. ``connect`` makes connections, for tests.

    Raises:
        ConfigError: a server's settings cannot be used.
    """

    def __init__(
        self,
        settings: Mapping[str, McpSettings],
        *,
        launchers: Launchers,
        schema_problem: SchemaProblem,
        changed: Changed = lambda specs, instead_of: None,
        lookup: Lookup = look_up,
        clock: Clock | None = None,
        connect: Connect | None = None,
    ) -> None:
        clock = clock or SystemClock()
        self._servers: dict[str, _Server] = {}
        for name, section in settings.items():
            prefix = _checked(name, section, launchers, taken=self._servers)
            server = _Server(
                name,
                section,
                connect=connect or _connector(launchers, lookup),
                schema_problem=schema_problem,
                changed=changed,
                clock=clock,
            )
            self._servers[prefix] = server

    async def start(self) -> None:
        """Start every server and return when each has listed its tools or failed to.

        Those that failed are tried again until they list their tools. Without it a server is
        started by the first call of one of its tools.
        """
        await asyncio.gather(*(server.start() for server in self._servers.values()))

    def specs(self) -> list[ToolSpec]:
        """Return the tools that have been listed so far."""
        return [spec for server in self._servers.values() for spec in server.specs()]

    def known(self) -> list[str]:
        """Return what the names of the tools begin with of the servers that have listed theirs."""
        return [prefix for prefix, server in self._servers.items() if server.known]

    def run(self, name: str) -> Run | None:
        """Return what runs a tool that another process has listed; None if it is of no server."""
        prefix, mark, _ = name.partition("__")
        server = self._servers.get(prefix) if mark else None
        return None if server is None else server.runner(name)

    async def close(self) -> None:
        """End every server."""
        await asyncio.gather(*(server.close() for server in self._servers.values()))


class _Server:
    """One server: its tools, its connection while there is one, and when there may be a next."""

    def __init__(
        self,
        name: str,
        settings: McpSettings,
        *,
        connect: Connect,
        schema_problem: SchemaProblem,
        changed: Changed,
        clock: Clock,
    ) -> None:
        self._name = name
        self._settings = settings
        self._connect = connect
        self._schema_problem = schema_problem
        self._changed = changed
        self._clock = clock
        self._offers: dict[str, Offer] = {}
        self._live: _Connected | None = None
        self._keeper: asyncio.Task[None] | None = None
        # Set when the attempt to connect has listed the tools, or failed.
        self._attempt = asyncio.Event()
        self._eager = False
        self._known = False
        self._closed = False
        self._failures = 0
        self._not_before = 0.0
        self._places = asyncio.Semaphore(settings.max_concurrent)
        self._calls = 0

    async def start(self) -> None:
        self._eager = True
        await self._attempted()

    @property
    def known(self) -> bool:
        return self._known

    def specs(self) -> list[ToolSpec]:
        settings = self._settings
        return [
            ToolSpec(
                name=offer.name,
                description=offer.description,
                parameters=offer.parameters,
                run=self.runner(offer.name),
                on_crash=offer.on_crash,
                timeout_s=settings.start_timeout_s + settings.timeout_s + _SLACK_S,
                limits=Limits(output_bytes=settings.max_output_bytes),
                cpu=0.1,
            )
            for offer in self._offers.values()
        ]

    def runner(self, name: str) -> Run:
        async def run(arguments: dict[str, Any], context: ToolContext) -> str:
            return await self._call(name, arguments)

        return run

    async def close(self) -> None:
        self._closed = True
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])

    async def _call(self, name: str, arguments: dict[str, Any]) -> str:
        if self._calls >= self._settings.max_concurrent * _CALLS_PER_PLACE:
            raise ToolError(f"the server {self._name!r} has too many calls", reason="upstream")
        self._calls += 1
        try:
            async with self._places:
                connection = await self._connected()
                offer = self._offers.get(name)
                if offer is None:
                    gone = f"the server {self._name!r} has no tool {name!r} any more"
                    raise ToolError(gone, reason="refused")
                return await connection.call(offer.tool, arguments)
        finally:
            self._calls -= 1

    async def _connected(self) -> _Connected:
        if self._live is not None and not self._live.alive and self._keeper is not None:
            # It is about to be gone, and another one comes behind it.
            await asyncio.wait([self._keeper])
        if self._live is None:
            if self._not_before - self._clock.monotonic() > self._settings.start_timeout_s:
                raise self._down()
            await self._attempted()
        if self._live is None:
            raise self._down()
        return self._live

    async def _attempted(self) -> None:
        """Wait for the attempt to connect that is under way, or for a new one."""
        if self._closed:
            return
        if self._keeper is None or self._keeper.done():
            self._attempt.clear()
            self._keeper = asyncio.create_task(self._keep(), name=f"mcp-{self._name}")
        await self._attempt.wait()

    def _down(self) -> ToolError:
        return ToolError(f"the server {self._name!r} is not there", reason="upstream")

    async def _keep(self) -> None:
        """Keep one connection, and make another when the tools are still not known."""
        while True:
            self._attempt.clear()
            await asyncio.sleep(max(0.0, self._not_before - self._clock.monotonic()))
            await self._keep_one()
            if self._known or not self._eager:
                return

    async def _keep_one(self) -> None:
        began = self._clock.monotonic()
        connection = self._connect(self._name, self._settings)
        try:
            await connection.run(lambda tools: self._listed(connection, tools))
            log.info("mcp_server_ended", server=self._name)
        except Exception as error:  # noqa: BLE001 - whatever a server does must end here
            log.warning("mcp_server_failed", server=self._name, error=_causes(error))
        finally:
            self._live = None
            now = self._clock.monotonic()
            self._failures = 1 if now - began >= _LIVED_S else self._failures + 1
            pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(self._failures - 1, 10))
            self._not_before = now + pause_s
            self._attempt.set()

    def _listed(self, connection: _Connected, tools: Sequence[Listed]) -> None:
        found = offers_of(
            self._name,
            tools,
            only=self._settings.tools,
            most=self._settings.max_tools,
            schema_problem=self._schema_problem,
        )
        for name, reason in found.left_out:
            log.warning("mcp_tool_left_out", server=self._name, tool=name, reason=reason)
        before = tuple(self._offers)
        known = list(self._offers.values())
        self._offers = {offer.name: offer for offer in found.offers}
        self._known = True
        self._live = connection
        self._attempt.set()
        if known != list(self._offers.values()):
            log.info("mcp_tools_listed", server=self._name, tools=len(self._offers))
            self._changed(self.specs(), before)


def _checked(name: str, settings: McpSettings, launchers: Launchers, *, taken: object) -> str:
    where = f"tools.mcp.{name}"
    prefix = server_prefix(name)
    assert isinstance(taken, dict)
    if prefix in taken or "__" in prefix or len(prefix) > 32:
        raise ConfigError(f"{where}: expected a short name of its own, without __ in it")
    if (settings.command is None) == (settings.url is None):
        raise ConfigError(f"{where}: expected either a command or a url")
    if settings.command is not None and launchers(settings) is None:
        raise ConfigError(f"{where}: a {settings.sandbox} cannot be had here")
    if settings.url is not None and not settings.url.startswith(("http://", "https://")):
        raise ConfigError(f"{where}.url: expected http:// or https://…")
    return prefix


def _connector(launchers: Launchers, lookup: Lookup) -> Connect:
    def connect(name: str, settings: McpSettings) -> _Connected:
        # Costs a second, and is an extra of the package: only for those who have servers.
        from agentray.tools.mcp_connection import Connection

        return Connection(name, settings, launcher=launchers(settings), lookup=lookup)

    return connect


def _causes(error: BaseException) -> str:
    """Return the kinds of the errors in a group, and the words of our own: no server's words."""
    if isinstance(error, BaseExceptionGroup):
        parts = cast("BaseExceptionGroup[BaseException]", error).exceptions
        return ", ".join(dict.fromkeys(map(_causes, parts)))
    said = f": {error.message}" if isinstance(error, ToolError) else ""
    return type(error).__name__ + said
