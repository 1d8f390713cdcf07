"""Run equal calls of a tool once: results by tenant and arguments, one flight at a time."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Awaitable, Callable
from typing import Any, Literal, cast

import msgspec

from agentray.clock import Clock
from agentray.errors import StorageError
from agentray.storage.base import ResultStore
from agentray.telemetry.logging import get_logger
from agentray.tools.spec import ToolResult, ToolSpec

__all__ = ["ResultCache", "result_key"]

log = get_logger(__name__)

# Part of every key: results of another layout are never found.
_LAYOUT = 1
_FLIGHT_TERM_S = 3.0
_FIRST_PAUSE_S = 0.01
_LONGEST_PAUSE_S = 0.25
_PAUSE_GROWTH = 1.5
# As long as the slowest of the waiting hosts may need to ask once more.
_ALONE_S = 2.0

_results = msgspec.json.Decoder(ToolResult)


def result_key(tenant: str, spec: ToolSpec, arguments: dict[str, Any]) -> str:
    """Return the digest of what decides a result: the order of keys counts for nothing, and 1.0
    is 1."""
    parts = [_LAYOUT, tenant, spec.name, spec.version, _plain(arguments)]
    return hashlib.sha256(msgspec.json.encode(parts, order="deterministic")).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in cast("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return [_plain(item) for item in cast("list[Any]", value)]
    return value


class ResultCache:
    """The results of one process and event loop; see ``get``.

    ``owner`` is the process's id, which no other has or had. ``store`` keeps results for the
    longest cache time of any tool at least.
    """

    def __init__(
        self,
        store: ResultStore,
        clock: Clock,
        *,
        owner: str,
        max_entry_bytes: int = 256 * 1024,
        count: Callable[[Literal["hit", "shared", "miss", "unavailable"]], None] = lambda _: None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._store = store
        self._clock = clock
        self._owner = owner
        self._max_entry_bytes = max_entry_bytes
        self._count = count
        self._sleep = sleep
        # Digest -> what becomes of the call that is made here now: a result to share, or None.
        self._flights: dict[str, asyncio.Future[ToolResult | None]] = {}
        self._begun = 0

    async def get(
        self,
        spec: ToolSpec,
        tenant: str,
        arguments: dict[str, Any],
        run: Callable[[], Awaitable[ToolResult]],
    ) -> ToolResult:
        """Return the result of ``run``, or of an equal one of the tenant's that is not too old.

        Only a tool with ``cache_s`` that keeps no files shares results, and only good ones: whoever
        waited for a call that failed makes his own. Whoever waited for one that was cancelled is
        the next to make it. With the store away, equal calls of this process still share one.

        Raises:
            Exception: what ``run`` raised, for its own caller only.
        """
        if spec.cache_s <= 0 or spec.keeps_scratch:
            return await run()
        key = result_key(tenant, spec, arguments)
        # Twice its run: it may have waited in a queue before.
        until = self._clock.monotonic() + 2 * spec.timeout_s
        while (flight := self._flights.get(key)) is not None:
            left_s = until - self._clock.monotonic()
            await asyncio.wait({flight}, timeout=max(0.0, left_s))
            if not flight.done():
                return await run()
            if flight.cancelled():
                continue
            if (found := flight.result()) is not None:
                self._count("shared")
                return msgspec.structs.replace(found, cached=True)
            return await run()
        flight = self._flights[key] = asyncio.get_running_loop().create_future()
        try:
            result = await self._fly(key, spec, run, until)
            flight.set_result(result if _worth_sharing(result) else None)
            return result
        except asyncio.CancelledError:
            flight.cancel()
            raise
        except BaseException:
            flight.set_result(None)
            raise
        finally:
            del self._flights[key]

    async def _fly(
        self,
        key: str,
        spec: ToolSpec,
        run: Callable[[], Awaitable[ToolResult]],
        until: float,
    ) -> ToolResult:
        self._begun += 1
        name = f"{self._owner}/{self._begun}"
        begun, found = await self._begin(key, name, spec.cache_s, until)
        if found is not None:
            return found
        if not begun:
            return await run()
        renewing = asyncio.create_task(self._renew(key, name))
        kept = False
        alone_s = 0.0
        try:
            result = await run()
            kept = _worth_sharing(result) and await self._keep(key, name, result)
            # Those who wait elsewhere would else fail one after another.
            alone_s = 0.0 if kept else _ALONE_S
            return result
        except Exception:
            alone_s = _ALONE_S
            raise
        finally:
            renewing.cancel()
            if not kept:
                await self._end(key, name, alone_s)

    async def _begin(
        self, key: str, name: str, cache_s: float, until: float
    ) -> tuple[bool, ToolResult | None]:
        """Return whether this flight leads, and a result that is there."""
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                begun = await self._store.begin_flight(
                    key, name, term_s=_FLIGHT_TERM_S, age_s=cache_s
                )
            except StorageError:
                self._count("unavailable")
                return False, None
            if begun.outcome == "answer":
                with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
                    found = msgspec.structs.replace(_results.decode(begun.answer), cached=True)
                    self._count("hit" if pause_s == _FIRST_PAUSE_S else "shared")
                    return False, found
            if begun.outcome != "waits" or self._clock.monotonic() >= until:
                self._count("miss")
                # In the place of one that is damaged comes the new one.
                return begun.outcome in ("leads", "answer"), None
            await self._sleep(pause_s)
            pause_s = min(pause_s * _PAUSE_GROWTH, _LONGEST_PAUSE_S)

    async def _renew(self, key: str, name: str) -> None:
        leads = True
        while leads:
            await self._sleep(_FLIGHT_TERM_S / 3)
            with contextlib.suppress(StorageError):
                leads = await self._store.renew_flight(key, name, term_s=_FLIGHT_TERM_S)

    async def _keep(self, key: str, name: str, result: ToolResult) -> bool:
        # What it took was spent once.
        answer = msgspec.json.encode(ToolResult("ok", result.output))
        if len(answer) > self._max_entry_bytes:
            return False
        try:
            await self._store.put(key, name, answer)
        except StorageError as error:
            log.debug("result_not_kept", error=error.message)
            return False
        return True

    async def _end(self, key: str, name: str, alone_s: float) -> None:
        # Else its term ends it.
        with contextlib.suppress(StorageError):
            await self._store.end_flight(key, name, alone_s=alone_s)


def _worth_sharing(result: ToolResult) -> bool:
    return result.status == "ok" and result.scratch is None
