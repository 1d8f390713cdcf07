"""Find turns that nobody runs, and run them: the promise behind every acceptance."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine

from agentray.config.settings import SessionsSettings
from agentray.errors import AgentRayError, StorageError
from agentray.sessions.ownership import Ownership
from agentray.sessions.residents import Key, Residents
from agentray.storage.base import DurableStore
from agentray.telemetry.logging import get_logger

__all__ = ["Recovery"]

log = get_logger(__name__)

_BATCH = 32
_MOST_AT_ONCE = 256


class Recovery:
    """Polls what the wire may have lost: mail of our own sessions, and orphans of anybody's."""

    def __init__(
        self,
        *,
        store: DurableStore,
        ownership: Ownership,
        residents: Residents,
        settings: SessionsSettings,
        launch_dedicated: Callable[[str, str], Awaitable[None]] | None,
    ) -> None:
        self._store = store
        self._ownership = ownership
        self._residents = residents
        self._settings = settings
        self._launch_dedicated = launch_dedicated
        self._under_way: dict[Key | None, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Look at the inbox, for orphans and for idle sessions, until cancelled."""
        try:
            while True:
                await asyncio.sleep(self._settings.sweep_s)
                await self._guarded(self.look())
        finally:
            for task in self._under_way.values():
                task.cancel()

    async def look(self) -> None:
        """Do one round. Raises ``StorageError``.

        A session whose row somebody holds is waited for behind the round: it stalls no other.
        """
        if self._residents.draining:
            return
        for key in await self._mail():
            self._begin(key, self._take(key, "shared"))
        if self._launch_dedicated is not None and self._ownership.may_take_over():
            orphans = await self._store.orphans(term_s=self._settings.term_s, limit=_BATCH)
            if not self._ownership.may_take_over():
                orphans = []  # the store stood still meanwhile, and for the others too
            for tenant, session_id, placement in orphans:
                key = (tenant, session_id)
                self._begin(key, self._take(key, placement))
        self._begin(None, self._residents.passivate_idle())
        if self._under_way:
            await asyncio.wait(list(self._under_way.values()), timeout=self._settings.sweep_s)

    def _begin(self, key: Key | None, work: Coroutine[None, None, None]) -> None:
        if key in self._under_way or len(self._under_way) >= _MOST_AT_ONCE:
            work.close()
            return
        task = asyncio.get_running_loop().create_task(self._guarded(work))
        self._under_way[key] = task
        task.add_done_callback(lambda _: self._under_way.pop(key, None))

    async def _guarded(self, work: Coroutine[None, None, None]) -> None:
        try:
            await work
        except StorageError as error:
            log.warning("sweep_failed", error=str(error))
        except Exception as error:  # the outer wall: the sweep must go on
            log.exception("sweep_failed", error=type(error).__name__)

    async def _mail(self) -> list[Key]:
        """Return sessions of ours with mail or cancellations that we do not know of."""
        unknown: dict[Key, None] = {}
        for turn in await self._store.inbox(self._ownership.owner_id):
            key = (turn.tenant, turn.session_id)
            if turn.cancel_requested or not self._residents.knows(key, turn.turn_id):
                unknown[key] = None
        return list(unknown)

    async def _take(self, key: Key, placement: str) -> None:
        try:
            if placement == "dedicated" and self._launch_dedicated is not None:
                await self._launch_dedicated(*key)
            elif self._residents.find(key) is not None:
                await self._residents.look_into_inbox(key)
            else:
                await self._residents.activate(key)
        except StorageError:
            raise
        except AgentRayError as error:
            log.warning("recovery_failed", session=key[1], error=str(error))
