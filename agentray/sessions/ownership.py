"""Say to everybody that this owner lives, and know when that may no longer be believed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from agentray.clock import Clock
from agentray.config.settings import SessionsSettings
from agentray.errors import StorageError
from agentray.ids import new_owner_id
from agentray.storage.base import DurableStore
from agentray.telemetry.logging import get_logger

__all__ = ["Ownership"]

log = get_logger(__name__)


class Ownership:
    """An owner's heartbeat.

    The beat runs in the event loop that runs the turns: a loop that hangs does not beat, so the
    owner counts as dead although its process lives.
    """

    def __init__(
        self,
        store: DurableStore,
        settings: SessionsSettings,
        clock: Clock,
        *,
        kind: str,
        address: str,
    ) -> None:
        self.owner_id = new_owner_id()
        self._store = store
        self._settings = settings
        self._clock = clock
        self._kind = kind
        self._address = address
        self._beat_at = clock.monotonic()
        self._take_over_at = 0.0
        self._confirming = asyncio.Lock()
        self.verify: Callable[[], Awaitable[None]] | None = None
        """Drops the sessions that are no longer ours; awaited after a gap in the beats."""

    def fresh(self) -> bool:
        """Return whether nobody can have declared this owner dead."""
        return self._clock.monotonic() - self._beat_at < self._settings.term_s

    def may_take_over(self) -> bool:
        """Return whether others' silence means something.

        While our own beat is overdue it does not, nor for one full term after the store was away
        or slow: they could not beat either.
        """
        now = self._clock.monotonic()
        in_time = now - self._beat_at < self._settings.term_s - self._settings.beat_s
        return in_time and now >= self._take_over_at

    async def beat(self) -> None:
        """Beat once. Raises ``StorageError``."""
        # The time before the statement counts: the store's clock cannot be earlier.
        asked_at = self._clock.monotonic()
        await self._store.beat(self.owner_id, kind=self._kind, address=self._address)
        answered_at = self._clock.monotonic()
        if not self.fresh() or answered_at - asked_at > self._settings.beat_s:
            # Others may have been held up by the same store or machine.
            self._take_over_at = answered_at + self._settings.term_s
        if not self.fresh() and self.verify is not None:
            log.warning("owner_slept_past_its_term", owner=self.owner_id)
            await self.verify()
        # Only now: whoever waits in confirm must not go on with sessions that are another's.
        self._beat_at = asked_at

    async def run(self) -> None:
        """Beat until cancelled."""
        while True:
            try:
                await self.beat()
            except StorageError as error:
                log.warning("beat_failed", owner=self.owner_id, error=str(error))
                self._take_over_at = self._clock.monotonic() + self._settings.term_s
            await asyncio.sleep(self._settings.beat_s)

    async def confirm(self) -> None:
        """Return when this owner is known to be alive and to have dropped what it lost.

        Costs nothing but after a gap: then the store is asked, for as long as that takes.
        """
        while not self.fresh():
            async with self._confirming:
                if self.fresh():
                    return
                try:
                    await self.beat()
                except StorageError:
                    self._take_over_at = self._clock.monotonic() + self._settings.term_s
                    await asyncio.sleep(self._settings.beat_s / 4)

    async def leave(self) -> None:
        """Say that this owner has gone, so that nobody waits for its term."""
        try:
            await self._store.forget_owner(self.owner_id)
        except StorageError as error:
            log.warning("leave_failed", owner=self.owner_id, error=str(error))
