"""Give up all sessions of an owner that leaves, at the ends of their turns."""

from __future__ import annotations

import asyncio
import contextlib

from agentray.errors import StorageError
from agentray.sessions.actor import SessionActor
from agentray.sessions.residents import Residents
from agentray.storage.base import DurableStore
from agentray.telemetry.logging import get_logger

__all__ = ["drain"]

log = get_logger(__name__)

_GIVEN_UP_AT_ONCE = 32


async def drain(residents: Residents, store: DurableStore, *, timeout_s: float) -> None:
    """Take nothing new, and release everything at the ends of turns; what still runs after the
    time is left to recovery by others."""
    residents.draining = True
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await _give_all_up(residents, store)
    for actor in residents:
        if actor.busy:
            residents.lose(actor)
        else:
            # No need to release it: nothing is ours when the owner's row is gone.
            residents.drop(actor)


async def _give_all_up(residents: Residents, store: DurableStore) -> None:
    while len(residents):
        # Now, not when the owner leaves: others can have them while turns run on here.
        idle = [actor for actor in residents if not actor.busy]
        for start in range(0, len(idle), _GIVEN_UP_AT_ONCE):
            batch = idle[start : start + _GIVEN_UP_AT_ONCE]
            if not all(await asyncio.gather(*[_give_up(residents, store, a) for a in batch])):
                # The store's time limit is waited for once, not once a batch.
                for actor in idle:
                    residents.drop(actor)
                break
        tasks = [actor.task for actor in residents if actor.task is not None]
        if tasks:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


async def _give_up(residents: Residents, store: DurableStore, actor: SessionActor) -> bool:
    """Release an idle session with its mail, and drop it; False if the store is away."""
    # Mail does not hold a draining host: the session's next owner reads it.
    actor.mailbox = None
    try:
        while True:
            outcome = await store.release(
                actor.tenant, actor.id, epoch=actor.epoch, inbox=actor.inbox
            )
            if outcome != "inbox":
                return True
            found = await store.open_turns(actor.tenant, actor.id, epoch=actor.epoch)
            if found is None:
                return True
            actor.inbox = found[0]
    except StorageError as error:
        log.warning("drain_release_failed", session=actor.id, error=str(error))
        return False
    finally:
        residents.drop(actor)
