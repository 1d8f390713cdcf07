"""The sessions that this process owns: activation, their mailboxes, passivation, loss."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterator, Sequence

import msgspec

from agentray.clock import Clock
from agentray.config.settings import SessionsSettings
from agentray.errors import AgentRayError, OwnershipLostError, SessionParkedError, StorageError
from agentray.events import Message, TurnOptions
from agentray.sessions.actor import SessionActor
from agentray.sessions.base import Placement
from agentray.sessions.ownership import Ownership
from agentray.sessions.restoring import is_usable, restore
from agentray.sessions.runtime import SessionRuntime, TurnNotBorn
from agentray.sessions.state import Command, Rules
from agentray.sessions.stream import Hub
from agentray.storage.base import (
    DurableStore,
    HotStore,
    TurnBirth,
    TurnRow,
)
from agentray.telemetry.logging import get_logger
from agentray.telemetry.metrics import Metrics

__all__ = ["Key", "Residents"]

log = get_logger(__name__)

_PASSIVATION_BATCH = 200
_FOR_EVER_S = 1e9

Key = tuple[str, str]
_First = Callable[[], Awaitable[tuple[Command, ...]]]


class Residents:
    """All actors of one owner, by (tenant, session id), least recently used first."""

    def __init__(
        self,
        *,
        store: DurableStore,
        hot: HotStore,
        runtime: SessionRuntime,
        ownership: Ownership,
        settings: SessionsSettings,
        placement: Placement,
        rules: Callable[[str], Rules],
        hubs: dict[Key, Hub],
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._store = store
        self._hot = hot
        self._runtime = runtime
        self._ownership = ownership
        self._settings = settings
        self._placement: Placement = placement
        self._rules = rules
        self._hubs = hubs
        self._clock = clock
        self._metrics = metrics
        self._actors: OrderedDict[Key, SessionActor] = OrderedDict()
        self._activating: dict[Key, asyncio.Future[SessionActor | None]] = {}
        self._releasing: dict[Key, asyncio.Task[bool]] = {}
        self._moving: set[asyncio.Future[None]] = set()
        self.running = 0
        self.draining = False
        self.on_claim: Callable[[Key], None] | None = None

    def __len__(self) -> int:
        return len(self._actors)

    def __iter__(self) -> Iterator[SessionActor]:
        """Iterate over the sessions that are here now."""
        return iter(list(self._actors.values()))

    def find(self, key: Key) -> SessionActor | None:
        """Return a resident session and note its use."""
        actor = self._actors.get(key)
        if actor is not None:
            self._actors.move_to_end(key)
            actor.used_at = self._clock.monotonic()
        return actor

    def peek(self, key: Key) -> SessionActor | None:
        """Return a resident session without counting that as a use."""
        return self._actors.get(key)

    def knows(self, key: Key, turn_id: str) -> bool:
        """Return whether an accepted turn waits or runs here already."""
        actor = self._actors.get(key)
        if actor is None:
            return False
        turn = actor.state.turn
        if turn is not None and turn.id == turn_id:
            return True
        return any(row.id == turn_id for row in actor.mailbox or ())

    # Activation

    async def activate(self, key: Key) -> SessionActor | None:
        """Bring a session to memory; None if it does not exist or a live owner has it.

        Raises:
            StorageUnavailableError: PostgreSQL is away.
            SessionsError: the journal cannot be folded; the session is parked then.
        """
        if (releasing := self._releasing.get(key)) is not None:
            await asyncio.shield(releasing)
        if (actor := self.find(key)) is not None:
            return actor
        if self.draining:
            return None
        if (waiting := self._activating.get(key)) is not None:
            return await asyncio.shield(waiting)
        task = asyncio.ensure_future(self._activate(key))
        self._activating[key] = task
        task.add_done_callback(lambda _: self._activating.pop(key, None))
        return await asyncio.shield(task)

    async def _activate(self, key: Key) -> SessionActor | None:
        tenant, session_id = key
        # The hot copy is fetched beside the claim: it is checked against the claimed row.
        hot_copy = asyncio.ensure_future(self._hot.load(tenant, session_id))
        claim = await self._store.claim(
            tenant,
            session_id,
            self._ownership.owner_id,
            placement=self._placement,
            # While silence means nothing, only what is nobody's may be taken.
            term_s=self._settings.term_s if self._ownership.may_take_over() else _FOR_EVER_S,
        )
        copy = await hot_copy
        if claim is None:
            return None
        try:
            rules = self._rules(claim.row.agent)
            usable = copy is not None and is_usable(copy, claim.row)
            self._metrics.activations.labels("hot" if usable else "durable").inc()
            state = await restore(self._store, claim.row, copy if usable else None, rules)
        except (msgspec.MsgspecError, AgentRayError) as error:
            if isinstance(error, StorageError):
                await self._store.release(
                    tenant, session_id, epoch=claim.row.epoch, inbox=claim.row.inbox
                )
                raise
            log.error("session_parked", session=session_id, error=str(error))
            reason = f"it cannot be brought back: {error}"
            await self._store.park(tenant, session_id, epoch=claim.row.epoch, reason=reason)
            raise SessionParkedError(
                f"session {session_id} is parked: {reason}", session_id=session_id
            ) from error
        actor = SessionActor(claim.row, state, rules)
        actor.used_at = self._clock.monotonic()
        if (hub := self._hubs.get(key)) is not None and hub.is_of(actor.born):
            hub.local = True
            hub.notify()
        self._actors[key] = actor
        if self.on_claim is not None:
            self.on_claim(key)
        if state.turn is not None:
            cancel = any(t.id == state.turn.id and t.cancel_requested for t in claim.turns)
            self._queue(actor, claim.turns)
            self._start(actor, self._resumed(actor, cancel))
        elif self._queue(actor, claim.turns):
            self._start(actor, None)
        return actor

    # Turns

    async def begin(
        self, actor: SessionActor, birth: TurnBirth, input: Sequence[Message], options: TurnOptions
    ) -> bool:
        """Accept a turn in an idle session and run it; False if that is for the store to decide:
        its idempotency key exists, or others accepted turns that are not known here.

        Returns when the acceptance is durable. Cancelling the caller cancels nothing.

        Raises:
            OwnershipLostError: the session is another's by now.
        """
        accepted: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        async def born() -> tuple[Command, ...]:
            try:
                commands = await self._runtime.run_born(actor, birth, input, options)
            except TurnNotBorn:
                _settle(accepted, False)
                return ()
            except BaseException as error:
                if not accepted.done():
                    accepted.set_exception(
                        error
                        if isinstance(error, AgentRayError)
                        else OwnershipLostError("this owner stops", session_id=actor.id)
                    )
                raise
            _settle(accepted, True)
            return commands

        actor.last_sender = actor.other_host = None
        self._start(actor, born)
        return await asyncio.shield(accepted)

    def _resumed(self, actor: SessionActor, cancel: bool) -> _First:
        return lambda: self._runtime.run_resumed(actor, cancel_requested=cancel)

    def _queue(self, actor: SessionActor, turns: Sequence[TurnRow]) -> bool:
        """Put accepted turns that are new into the mailbox; return whether it has any."""
        known = {row.id for row in actor.mailbox} if actor.mailbox else set[str]()
        current = actor.state.turn.id if actor.state.turn else None
        for row in turns:
            if row.state != "accepted" or row.id in known or row.id == current:
                continue
            if row.ordinal > actor.begun_ordinal:
                if actor.mailbox is None:
                    actor.mailbox = deque()
                actor.mailbox.append(row)
                actor.latest_turn = row.id
        return bool(actor.mailbox)

    def _start(self, actor: SessionActor, first: _First | None) -> None:
        self.running += 1
        actor.task = asyncio.get_running_loop().create_task(self._run(actor, first))

    async def _run(self, actor: SessionActor, first: _First | None) -> None:
        began = self._clock.monotonic()
        try:
            self._go_live(actor)
            if first is not None:
                commands = await first()
                await self._runtime.carry_out(actor, commands)
                self._metrics.turn_seconds.observe(self._clock.monotonic() - began)
            while actor.mailbox and not self.draining:
                row = actor.mailbox.popleft()
                actor.begun_ordinal = row.ordinal
                began = self._clock.monotonic()
                self._go_live(actor)
                commands = await self._runtime.run_accepted(actor, row)
                await self._runtime.carry_out(actor, commands)
                self._metrics.turn_seconds.observe(self._clock.monotonic() - began)
        except OwnershipLostError as error:
            log.warning("ownership_lost", session=actor.id, error=str(error))
            self._metrics.ownership_lost.inc()
            self.drop(actor)
        except asyncio.CancelledError:
            self.drop(actor)
            raise
        except Exception as error:  # the room's outer wall: one session must not end the others
            log.exception("session_failed", session=actor.id, error=type(error).__name__)
            self.drop(actor)
            await self._park(actor, f"{type(error).__name__}: {error}")
        finally:
            self.running -= 1
            actor.task = None
            if not actor.dropped:
                self.find(actor.key)
            self._after_run(actor)

    def _go_live(self, actor: SessionActor) -> None:
        """Give a turn that begins a hub of its own; readers that lag read the journal."""
        if actor.hub is None:
            stale = self._hubs.get(actor.key)
            if stale is not None and not stale.is_of(actor.born):
                del self._hubs[actor.key]
                stale.notify()
            actor.hub = self._hubs.setdefault(actor.key, Hub(born=actor.born))
        actor.hub.local = actor.hub.live = True
        actor.hub.rebase(actor.state.seq)

    def _after_run(self, actor: SessionActor) -> None:
        hub, actor.hub = actor.hub, None
        resident = self._actors.get(actor.key)
        if hub is not None and (resident is None or resident.hub is not hub):
            hub.live = False
            hub.prune(self._clock.monotonic())
            if not hub.wanted and self._hubs.get(actor.key) is hub:
                del self._hubs[actor.key]
        if actor.mailbox is not None and not actor.mailbox:
            actor.mailbox = None
        if actor.other_host is not None and not actor.dropped:
            # Two messages in a row came through another host: it may have the session.
            self._moving.add(task := asyncio.ensure_future(self._move(actor)))
            task.add_done_callback(self._moving.discard)

    async def _move(self, actor: SessionActor) -> None:
        try:
            await self.release(actor)
        except StorageError as error:
            log.warning("release_failed", session=actor.id, error=str(error))

    async def _park(self, actor: SessionActor, reason: str) -> None:
        try:
            await self._store.park(actor.tenant, actor.id, epoch=actor.epoch, reason=reason)
        except StorageError as error:
            log.error("park_failed", session=actor.id, error=str(error))

    async def look_into_inbox(self, key: Key) -> None:
        """Take up what others accepted or cancelled in a session of ours."""
        if (releasing := self._releasing.get(key)) is not None:
            # It finds the mail itself, or the session is nobody's behind it.
            await asyncio.shield(releasing)
        actor = self._actors.get(key)
        if actor is not None:
            await self._take_mail(actor)

    def deliver(self, actor: SessionActor, epoch: int, inbox: int, row: TurnRow) -> bool:
        """Take up a turn that another host accepted; False if there may be more than that."""
        if actor.dropped or actor.key in self._releasing:
            return False
        if (epoch, inbox) != (actor.epoch, actor.inbox + 1):
            return False
        actor.inbox = inbox
        if self._queue(actor, [row]) and not actor.busy and not self.draining:
            self._start(actor, None)
        return True

    async def _take_mail(self, actor: SessionActor) -> None:
        found = await self._store.open_turns(actor.tenant, actor.id, epoch=actor.epoch)
        if actor.dropped:
            return
        if found is None:
            self.lose(actor)
            return
        # Meanwhile a message may have told of a later turn.
        actor.inbox, turns = max(actor.inbox, found[0]), found[1]
        for row in turns:
            if row.cancel_requested:
                self.cancel_here(actor, row.id)
        if self._queue(actor, turns) and not actor.busy and not self.draining:
            self._start(actor, None)

    def cancel_here(self, actor: SessionActor, turn_id: str) -> None:
        """Cancel a turn of a resident session, running or waiting."""
        if actor.cancel(turn_id) or not actor.mailbox:
            return
        for index, row in enumerate(actor.mailbox):
            if row.id == turn_id and not row.cancel_requested:
                actor.mailbox[index] = msgspec.structs.replace(row, cancel_requested=True)

    def came_through(self, actor: SessionActor, host: str) -> None:
        """Note that a message arrived at another host; the second in a row moves the session."""
        if actor.last_sender == host and self._placement == "shared":
            actor.other_host = host
        actor.last_sender = host

    def queued(self) -> int:
        """Return how many accepted turns wait in the mailboxes."""
        return sum(len(actor.mailbox) for actor in self._actors.values() if actor.mailbox)

    # Leaving memory

    async def release(self, actor: SessionActor) -> bool:
        """Give an idle session up; False if it is busy or has mail."""
        key = actor.key
        if actor.busy or actor.dropped or key in self._releasing:
            return False
        task = asyncio.ensure_future(self._release(actor))
        self._releasing[key] = task
        task.add_done_callback(lambda _: self._releasing.pop(key, None))
        return await asyncio.shield(task)

    async def _release(self, actor: SessionActor) -> bool:
        try:
            outcome = await self._store.release(
                actor.tenant, actor.id, epoch=actor.epoch, inbox=actor.inbox
            )
        except StorageError:
            # It may be nobody's by now: what is not known to be ours is not kept.
            self.drop(actor)
            raise
        if outcome == "inbox":
            await self._take_mail(actor)
            return False
        self._metrics.passivations.inc()
        self.drop(actor)
        return True

    def drop(self, actor: SessionActor) -> None:
        """Forget a session without a word: it is released, or another's."""
        if actor.dropped:
            return
        actor.dropped = True
        if self._actors.get(actor.key) is actor:
            del self._actors[actor.key]
        if (hub := self._hubs.get(actor.key)) is not None:
            hub.local = False
            hub.followers = {}
            hub.notify()
            if not hub.wanted and not hub.live:
                del self._hubs[actor.key]
        self._hot.forget(actor.tenant, actor.id)

    def lose(self, actor: SessionActor) -> None:
        """Drop a session that is another's, and stop what runs in it."""
        self._metrics.ownership_lost.inc()
        self.drop(actor)
        if actor.task is not None:
            actor.task.cancel()

    async def passivate_idle(self) -> None:
        """Release sessions that were idle for long, and the oldest of too many."""
        now = self._clock.monotonic()
        excess = len(self._actors) - self._settings.max_resident
        chosen: list[SessionActor] = []
        for actor in self._actors.values():
            over = len(chosen) < excess
            if not over and now - actor.used_at < self._settings.idle_s:
                break
            hub = self._hubs.get(actor.key)
            if not actor.busy and not (hub is not None and hub.readers):
                chosen.append(actor)
            if len(chosen) >= _PASSIVATION_BATCH:
                break
        for actor in chosen:
            if not actor.busy:
                await self.release(actor)

    async def verify(self) -> None:
        """Drop every session whose epoch has moved while this process slept."""
        actors = list(self._actors.values())
        epochs = await self._store.epochs([actor.key for actor in actors])
        for actor in actors:
            if epochs.get(actor.key) != actor.epoch and not actor.dropped:
                self.lose(actor)


def _settle(future: asyncio.Future[bool], value: bool) -> None:
    if not future.done():
        future.set_result(value)
