"""The tools of an owner process: what its agents are offered, and how calls get to the pool."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from typing import Literal

import msgspec

from agentray.agents.spec import Agents
from agentray.clock import Clock
from agentray.config.settings import BreakerSettings, CacheSettings, Settings
from agentray.errors import ToolError
from agentray.models.breaker import Breaker
from agentray.sessions.tool_calls import ToolCalls
from agentray.storage.base import ScratchStore, WaitingStore
from agentray.storage.redis_answers import RedisAnswers
from agentray.telemetry.logging import get_logger
from agentray.telemetry.metrics import Metrics
from agentray.tools.cache import ResultCache
from agentray.tools.client import ToolClient
from agentray.tools.listing import LISTING, Listing, decode_listing
from agentray.tools.location import Locate
from agentray.tools.runner import Ask
from agentray.tools.spec import Toolbox
from agentray.tools.toolbox import open_toolbox

__all__ = ["OwnerTools"]

log = get_logger(__name__)

# How long a process that starts waits for the tools of MCP servers; then it goes on without.
_FIRST_LISTING_S = 20.0
_LISTING_S = 15.0
_SOON_S = 0.5


class OwnerTools:
    """What an owner process knows of tools; ``box`` is filled by ``start``.

    Without ``locate`` there is no pool: tools that need a worker are refused.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        owner_id: str,
        agents: Agents,
        locate: Locate | None,
        scratch: ScratchStore,
        waiting: WaitingStore,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        if settings.redis.url is None:
            raise ValueError("the tools of an owner process need the address of Redis")
        self._settings = settings.tools
        self._clock = clock
        self._owner_id = owner_id
        self.box = Toolbox([])
        self._client = (
            ToolClient(owner_id, locate, clock=clock, metrics=metrics) if locate else None
        )
        self._redis_url = settings.redis.url.get_secret_value()
        self._redis_settings = settings.redis
        self._metrics = metrics
        self._results: RedisAnswers | None = None
        self._local: Toolbox | None = None
        self._listed: set[str] = set()
        self._groups: set[str] = set()
        self._known = asyncio.Event()
        self._numbers = itertools.count(1)
        self.calls = ToolCalls(
            tools=self.box,
            agents=agents,
            pool=self._client,
            scratch=scratch,
            waiting=waiting,
            clock=clock,
            queue_s=settings.tools.workers.max_wait_s,
        )

    async def start(self) -> None:
        """Read what the settings say.

        Raises:
            ConfigError: the settings cannot be used.
        """
        self._local = await open_toolbox(
            self._settings, breaker=lambda host: Breaker(BreakerSettings()), clock=self._clock
        )
        self.box.put(self._local.specs)
        if longest_s := max((spec.cache_s for spec in self._local.specs), default=0.0):
            self._results = RedisAnswers(
                self._redis_url,
                self._redis_settings,
                CacheSettings(ttl_s=longest_s, max_bytes=self._settings.cache_bytes),
                clock=self._clock,
                name="results",
            )
            self.calls.shared = ResultCache(
                self._results, self._clock, owner=self._owner_id, count=self._count
            )

    async def run(self) -> None:
        """Keep the list of what MCP servers offer, which only workers can ask; endless."""
        pause_s = _SOON_S
        while True:
            # Servers that are not there yet may soon be.
            pause_s = _LISTING_S if await self._list() else min(2 * pause_s, _LISTING_S)
            await asyncio.sleep(pause_s)

    async def known(self) -> None:
        """Return when a worker has told the tools of MCP servers, or it takes too long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FIRST_LISTING_S):
                await self._known.wait()

    @property
    def lists(self) -> bool:
        """Whether there is anything for ``run`` to do, and for ``known`` to wait for."""
        return bool(self._settings.mcp) and self._client is not None

    async def close(self) -> None:
        """Close every connection."""
        if self._client is not None:
            await self._client.close()
        if self._local is not None:
            await self._local.close()
        if self._results is not None:
            await self._results.close()

    async def _list(self) -> bool:
        """Ask a worker; return whether the tools of all servers are known."""
        assert self._client is not None
        number = next(self._numbers)
        ask = Ask(
            tenant="agentray",
            session_id=self._owner_id,
            epoch=1,
            call_key=f"listing/{number}",
            tool=LISTING,
            deadline=self._clock.now() + _LISTING_S,
            cpu=0.01,
            on_crash="retry",
        )
        try:
            result = await self._client.call(ask)
        except ToolError as error:
            log.warning("tools_not_listed", error=error.message)
            return False
        if result.status != "ok":
            log.warning("tools_not_listed", reason=result.reason)
            return False
        try:
            return self.learn(decode_listing(result.output.encode()))
        except msgspec.DecodeError as error:
            log.warning("tools_not_listed", error=str(error))
            return False

    def learn(self, found: Listing) -> bool:
        """Take in what a worker told; return whether the tools of all servers are known by now."""
        # What this worker cannot tell yet stays as another one told it.
        gone = {name for name in self._listed if found.has(name)}
        specs = found.specs()
        self.box.put(specs, instead_of=gone)
        self._listed = (self._listed - gone) | {spec.name for spec in specs}
        self._groups |= set(found.groups)
        self._known.set()
        return len(self._groups) >= len(self._settings.mcp)

    def _count(self, outcome: Literal["hit", "shared", "miss", "unavailable"]) -> None:
        self._metrics.tool_cache.labels(outcome).inc()
