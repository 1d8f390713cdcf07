"""Find turns that nobody runs, and run them: the promise behind every acceptance."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from agentray.config.settings import SessionsSettings
from agentray.errors import AgentRayError, StorageError
from agentray.sessions.ownership import Ownership
from agentray.sessions.residents import Residents
from agentray.storage.base import DurableStore
from agentray.telemetry.logging import get_logger

__all__ = ["Recovery"]

log = get_logger(__name__)

_BATCH = 32


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

    async def run(self) -> None:
        """Look at the inbox, for orphans and for idle sessions, until cancelled."""
        while True:
            await asyncio.sleep(self._settings.sweep_s)
            try:
                await self.look()
            except StorageError as error:
                log.warning("sweep_failed", error=str(error))
            except Exception as error:  # the outer wall: the sweep must go on
                log.exception("sweep_failed", error=type(error).__name__)

    async def look(self) -> None:
        """Do one round. Raises ``StorageError``."""
        if self._residents.draining:
            return
        for key in await self._mail():
            await self._take(key, "shared")
        if self._launch_dedicated is not None and self._ownership.may_take_over():
            orphans = await self._store.orphans(term_s=self._settings.term_s, limit=_BATCH)
            async with asyncio.TaskGroup() as group:
                for tenant, session_id, placement in orphans:
                    group.create_task(self._take((tenant, session_id), placement))
        await self._residents.passivate_idle()

    async def _mail(self) -> list[tuple[str, str]]:
        """Return sessions of ours with mail or cancellations that we do not know of."""
        unknown: dict[tuple[str, str], None] = {}
        for turn in await self._store.inbox(self._ownership.owner_id):
            key = (turn.tenant, turn.session_id)
            if turn.cancel_requested or not self._residents.knows(key, turn.turn_id):
                unknown[key] = None
        return list(unknown)

    async def _take(self, key: tuple[str, str], placement: str) -> None:
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
