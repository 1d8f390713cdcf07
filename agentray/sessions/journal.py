"""Append to the journals of all of an owner's sessions by group commit.

A batch goes out when the one before it has landed; what arrives meanwhile is the next batch. So
one append alone waits for nobody, and a hundred at once cost two statements.
"""

from __future__ import annotations

import asyncio

import msgspec

from agentray.errors import OwnershipLostError, StorageError, StorageUnavailableError
from agentray.storage.base import Append, AppendResult, DurableStore
from agentray.telemetry.logging import get_logger

__all__ = ["Journal"]

log = get_logger(__name__)

_MAX_BATCH = 256
_LOCKED_PAUSE_S = 0.01
_AWAY_PAUSE_S = (0.05, 0.1, 0.25, 0.5, 1.0)


class _Waiting(msgspec.Struct):
    append: Append
    done: asyncio.Future[AppendResult]
    unsure: bool = False


class Journal:
    """The one writer of an owner's journals.

    While the store is away appends wait and are tried again: whatever was queued lands when it
    is back, unless another owner took the session meanwhile. An append whose acknowledgement was
    lost is sent again; the fence refuses it if the first one landed, and the row shows that.
    """

    def __init__(self, store: DurableStore) -> None:
        self._store = store
        self._queue: list[_Waiting] = []
        self._task: asyncio.Task[None] | None = None
        self._stopped = False
        self.available = True

    async def append(self, append: Append) -> AppendResult:
        """Return ``landed``, ``duplicate`` or ``mail``.

        Cancelling the caller does not withdraw the append.

        Raises:
            OwnershipLostError: the fence refused it, or the session was deleted.
            StorageError: the store refused the append for what it contains.
        """
        if self._stopped:
            raise OwnershipLostError("this owner has stopped", session_id=append.session_id)
        waiting = _Waiting(append, asyncio.get_running_loop().create_future())
        self._push(waiting)
        result = await asyncio.shield(waiting.done)
        if result.outcome in ("landed", "duplicate", "mail"):
            return result
        raise OwnershipLostError(
            f"append {append.first_seq} of session {append.session_id} at epoch {append.epoch} "
            f"was refused: the session is {result.outcome}, at epoch {result.epoch}",
            session_id=append.session_id,
            outcome=result.outcome,
        )

    async def stop(self) -> None:
        """Write what is queued, if the store is there, and take nothing more."""
        self._stopped = True
        while self._task is not None and not self._task.done() and self.available:
            await asyncio.wait([self._task], timeout=0.1)
        if self._task is not None:
            self._task.cancel()

    def _push(self, waiting: _Waiting) -> None:
        self._queue.append(waiting)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        failures = 0
        while self._queue:
            batch, self._queue = self._queue[:_MAX_BATCH], self._queue[_MAX_BATCH:]
            try:
                results = await self._store.append([waiting.append for waiting in batch])
            except StorageUnavailableError as error:
                if self.available:
                    log.warning("journal_unavailable", error=str(error), waiting=len(batch))
                self.available = False
                for waiting in batch:
                    waiting.unsure = True
                self._queue[:0] = batch
                await asyncio.sleep(_AWAY_PAUSE_S[min(failures, len(_AWAY_PAUSE_S) - 1)])
                failures += 1
                continue
            except StorageError as error:
                await self._one_by_one(batch, error)
                continue
            if not self.available:
                log.info("journal_available", waiting=len(self._queue))
            self.available, failures = True, 0
            for waiting, result in zip(batch, results, strict=True):
                self._settle(waiting, result)

    async def _one_by_one(self, batch: list[_Waiting], error: StorageError) -> None:
        """Find the append that spoils its batch, so that the others land."""
        if len(batch) == 1:
            log.error("journal_refused", error=str(error))
            if not batch[0].done.done():
                batch[0].done.set_exception(error)
            return
        for waiting in batch:
            try:
                [result] = await self._store.append([waiting.append])
            except StorageUnavailableError:
                waiting.unsure = True
                self._queue.append(waiting)
            except StorageError as own:
                await self._one_by_one([waiting], own)
            else:
                self._settle(waiting, result)

    def _settle(self, waiting: _Waiting, result: AppendResult) -> None:
        append = waiting.append
        if result.outcome == "locked":
            # Somebody holds the row for a moment: it must not stall the other sessions.
            loop = asyncio.get_running_loop()
            loop.call_later(_LOCKED_PAUSE_S, self._push, waiting)
            return
        if (
            waiting.unsure
            and result.outcome == "stale"
            and result.epoch == append.epoch
            and result.last_seq == append.last_seq
        ):
            # Only we append at this epoch, one append at a time: this is the one that landed.
            result = AppendResult("landed", result.epoch, result.last_seq)
        if not waiting.done.done():
            waiting.done.set_result(result)
