"""Follow sessions wherever they run: attach, catch up from the journal, go on live."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import msgspec

from agentray.clock import Clock
from agentray.errors import (
    CursorError,
    SessionNotFoundError,
    SessionParkedError,
    StorageError,
    TurnNotFoundError,
)
from agentray.events import (
    AnyEvent,
    ModelCalled,
    ModelFailed,
    ModelFinished,
    ModelVoided,
    TurnAccepted,
    TurnFinished,
    TurnResumed,
    decode_event,
)
from agentray.sessions.base import Cursor, Delta, StreamItem, item_cursor
from agentray.sessions.stream import Hub, TailWriter, WireMessage
from agentray.storage.base import DurableStore
from agentray.telemetry.logging import get_logger

__all__ = ["Following"]

log = get_logger(__name__)

Key = tuple[str, str]

_POLL_S = 0.5
_RENEW_S = 10.0
_FOLLOWER_TTL_S = 30.0
_PAGE = 500


class _TextInFlight:
    """What a reader has of the running call's text, so that it gets the rest before the end."""

    def __init__(self, called_seq: int, seen: int) -> None:
        self._called_seq = called_seq
        self._seen = seen

    def complete(self, items: Sequence[StreamItem]) -> list[StreamItem]:
        """Return the items with a delta of what is missing in front of each end of a call."""
        completed: list[StreamItem] = []
        for item in items:
            if isinstance(item, Delta):
                self._seen = item.offset
            elif isinstance(item, ModelCalled):
                self._called_seq, self._seen = item.seq, item.continued_from
            elif isinstance(item, ModelFinished | ModelVoided | ModelFailed):
                rest = item.text[self._seen :]
                if rest:
                    self._seen += len(rest)
                    completed.append(Delta(item.turn_id, self._called_seq, self._seen, rest))
            completed.append(item)
        return completed


class Following:
    """All hubs of a process, and what keeps those alive whose session lives elsewhere."""

    def __init__(
        self,
        *,
        store: DurableStore,
        tails: TailWriter,
        owner_id: str,
        hubs: dict[Key, Hub],
        clock: Clock,
    ) -> None:
        self._store = store
        self._tails = tails
        self._owner_id = owner_id
        self._hubs = hubs
        self._clock = clock
        self._mirrors: dict[Key, tuple[Hub, asyncio.Task[None]]] = {}
        self._followed: dict[Key, tuple[str, float]] = {}

    def check_cursor(self, cursor: Cursor, last_seq: int) -> None:
        """Raise ``CursorError`` for a cursor behind the end of the journal."""
        if cursor.seq > last_seq:
            raise CursorError(
                f"the cursor {cursor.seq} lies in the future: the session is at {last_seq}",
                param="after",
            )

    async def follow(
        self, key: Key, after: Cursor, turn_id: str | None
    ) -> AsyncIterator[list[StreamItem]]:
        """Yield what ``Sessions.follow`` promises.

        Raises ``SessionParkedError`` behind the last event if ``turn_id`` is given and nobody
        will run that turn to its end. Without it the iterator waits on: a message that comes
        has the session tried again.
        """
        cursor, born = await self._start(key, after, turn_id)
        called_seq = await self._called_seq(key, cursor) if cursor == after else cursor.seq
        text = _TextInFlight(called_seq, cursor.offset)
        hub = self._join(key, cursor.seq, born)
        try:
            while True:
                items: Sequence[StreamItem] | None = hub.read(cursor)
                if items is None:
                    items = await self._page(key, cursor.seq, hub.base_seq)
                if not items:
                    if not hub.local:
                        if turn_id is not None and hub.parked_at is not None:
                            await self._check_parked(key, hub)
                            continue  # what came meanwhile woke nobody
                        self._keep_mirror(key, hub)
                    await hub.changed()
                    if self._hubs.get(key) is not hub:
                        row = await self._store.session(*key)
                        if row is None or not hub.is_of(row.first_epoch):
                            raise _deleted(key)
                        self._leave(key, hub)
                        hub = self._join(key, cursor.seq, row.first_epoch)
                    continue
                for item in items:
                    cursor = item_cursor(item, cursor)
                items = text.complete(items)
                if turn_id is None:
                    yield list(items)
                    continue
                own = [item for item in items if item.turn_id == turn_id]
                if own:
                    yield own
                if any(isinstance(item, TurnFinished) for item in own):
                    return
        finally:
            self._leave(key, hub)

    async def _start(self, key: Key, after: Cursor, turn_id: str | None) -> tuple[Cursor, int]:
        """Return the cursor to begin at, and the session's ``first_epoch``.

        Raises if there is no such place.
        """
        hub = self._hubs.get(key)
        if hub is not None and hub.local and turn_id is not None:
            for event in hub.events:
                if isinstance(event, TurnAccepted) and event.turn_id == turn_id:
                    self.check_cursor(after, hub.last_seq)
                    return max(after, Cursor(event.seq - 1)), hub.born
        row = await self._store.session(*key)
        if row is None:
            raise SessionNotFoundError(f"there is no session {key[1]!r}", session_id=key[1])
        last_seq = max(row.last_seq, hub.last_seq if hub is not None and hub.local else 0)
        self.check_cursor(after, last_seq)
        born = row.first_epoch
        if turn_id is None:
            return after, born
        turn = await self._store.turn(*key, turn_id)
        if turn is None:
            raise TurnNotFoundError(f"session {key[1]} has no turn {turn_id}", session_id=key[1])
        begins = turn.first_seq - 1 if turn.first_seq is not None else row.last_seq
        if turn.last_seq is not None and after.seq >= turn.last_seq:
            # All of it is known: show the end once more, so that the iterator ends.
            return Cursor(turn.last_seq - 1), born
        return max(after, Cursor(begins)), born

    async def _called_seq(self, key: Key, cursor: Cursor) -> int:
        """Return the call that a cursor may be in: takeovers can lie between it and its end."""
        seq = cursor.seq
        while seq > 0:
            bodies = await self._store.events(*key, after=seq - 1, limit=1, up_to=seq)
            if not bodies or not isinstance(decode_event(bodies[0]), TurnResumed):
                break
            seq -= 1
        return seq

    async def _page(self, key: Key, after: int, up_to: int) -> list[AnyEvent]:
        bodies = await self._store.events(*key, after=after, limit=_PAGE, up_to=up_to)
        if not bodies and await self._store.session(*key) is None:
            raise _deleted(key)
        return [decode_event(body) for body in bodies]

    def _join(self, key: Key, seq: int, born: int) -> Hub:
        hub = self._hubs.get(key)
        if hub is not None and not hub.is_of(born):
            self._abandon(key, hub)
            hub = None
        if hub is None:
            hub = self._hubs[key] = Hub(seq, born)
        hub.readers += 1
        return hub

    def _abandon(self, key: Key, hub: Hub) -> None:
        """Let the readers of a hub find that its session is gone; another may have its id."""
        if self._hubs.get(key) is hub:
            del self._hubs[key]
            self._forget(key)
        hub.notify()

    def _leave(self, key: Key, hub: Hub) -> None:
        hub.readers -= 1
        self._leave_unread(key, hub)

    def _leave_unread(self, key: Key, hub: Hub) -> None:
        if not hub.wanted and not hub.live and self._hubs.get(key) is hub:
            del self._hubs[key]
            self._forget(key)

    def _forget(self, key: Key) -> None:
        if key in self._mirrors:
            self._mirrors.pop(key)[1].cancel()
        self._followed.pop(key, None)

    # Sessions that live elsewhere

    def expect(self, key: Key, owner: str, last_seq: int) -> None:
        """Note that a live owner was just told to send us what it does in a session."""
        hub = self._hubs.get(key)
        if hub is None:
            hub = self._hubs[key] = Hub(last_seq)
            # A caller that does not follow its turn leaves nothing behind.
            loop = asyncio.get_running_loop()
            loop.call_later(_FOLLOWER_TTL_S, self._leave_unread, key, hub)
        self._followed[key] = (owner, self._clock.monotonic() + _RENEW_S)

    def _keep_mirror(self, key: Key, hub: Hub) -> None:
        known, mirror = self._mirrors.get(key, (None, None))
        if mirror is not None and not mirror.done():
            if known is hub:
                return
            # Of a hub that was replaced: it would never feed this one.
            mirror.cancel()
        mirror = asyncio.get_running_loop().create_task(self._mirror(key, hub))
        # Whatever ended it, readers must not wait for what it would have said.
        mirror.add_done_callback(lambda _: hub.notify())
        self._mirrors[key] = hub, mirror

    async def _mirror(self, key: Key, hub: Hub) -> None:
        """Feed a hub from the journal, and ask the session's owner to feed it live."""
        tenant, session_id = key
        pause_s = _POLL_S if key in self._followed else 0.0
        while hub.readers and not hub.local and self._hubs.get(key) is hub:
            await asyncio.sleep(pause_s)
            pause_s = _POLL_S
            try:
                row = await self._store.session(tenant, session_id)
                if row is None or not hub.is_of(row.first_epoch):
                    self._abandon(key, hub)
                    return
                owner = row.owner if row.owner_alive else None
                if owner is not None and owner != self._owner_id:
                    self._ask(key, owner)
                await self._fill(key, hub, row.last_seq)
                hub.parked_at = row.last_seq if row.parked_reason is not None else None
                if hub.parked_at is not None:
                    hub.notify()
            except StorageError as error:
                log.warning("mirror_failed", session=session_id, error=str(error))
            except Exception as error:  # the outer wall: readers would begin it again at once
                log.exception("mirror_failed", session=session_id, error=type(error).__name__)

    async def _fill(self, key: Key, hub: Hub, last_seq: int) -> None:
        """Feed a hub what the journal has; what cannot be read ends it, and parks its session."""
        try:
            while not hub.local and hub.last_seq < last_seq:
                bodies = await self._store.events(*key, after=hub.last_seq, limit=_PAGE)
                if not bodies:
                    break
                hub.feed([decode_event(body) for body in bodies])
        except msgspec.MsgspecError as error:
            log.error("journal_unreadable", session=key[1], error=str(error))

    async def _check_parked(self, key: Key, hub: Hub) -> None:
        """Raise ``SessionParkedError`` to a reader that has all, if the session is still parked.

        A message may have come since, and its turn must not fail for the one before.
        """
        row = await self._store.session(*key)
        if row is None:
            raise _deleted(key)
        if row.parked_reason is not None and row.last_seq == hub.parked_at:
            raise SessionParkedError(
                f"session {key[1]} is parked: {row.parked_reason}",
                session_id=key[1],
                reason=row.parked_reason,
            )
        hub.parked_at = None

    def _ask(self, key: Key, owner: str, *, again: bool = False) -> None:
        now = self._clock.monotonic()
        known, until = self._followed.get(key, ("", 0.0))
        if known == owner and now < until and not again:
            return
        self._followed[key] = (owner, now + _RENEW_S)
        message = WireMessage(
            kind="follow", tenant=key[0], session_id=key[1], sender=self._owner_id
        )
        self._tails.send([owner], message)

    def receive(self, message: WireMessage) -> None:
        """Take in what an owner says of a session that we follow."""
        key = (message.tenant, message.session_id)
        hub = self._hubs.get(key)
        if hub is None or hub.local:
            return
        try:
            whole = hub.apply(message)
        except msgspec.MsgspecError as error:
            log.warning("live_message_refused", error=str(error))
            return
        if not whole and (known := self._followed.get(key)) is not None:
            self._ask(key, known[0], again=True)

    def add_follower(self, hub: Hub, follower: str) -> None:
        """Note that another owner has readers of a session of ours."""
        now = self._clock.monotonic()
        hub.prune(now)
        hub.followers[follower] = now + _FOLLOWER_TTL_S

    async def close(self) -> None:
        mirrors = [mirror for _, mirror in self._mirrors.values()]
        for mirror in mirrors:
            mirror.cancel()
        for hub in self._hubs.values():
            hub.notify()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*mirrors, return_exceptions=True)


def _deleted(key: Key) -> SessionNotFoundError:
    return SessionNotFoundError(f"session {key[1]!r} was deleted", session_id=key[1])
