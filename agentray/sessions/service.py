"""What one process offers of all sessions: the doors ask here, wherever a session lives."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Literal

import msgspec

from agentray.agents.spec import Agents
from agentray.clock import Clock
from agentray.config.settings import SessionsSettings
from agentray.errors import (
    AgentRayError,
    BackpressureError,
    IdempotencyConflictError,
    InvalidRequestError,
    NotReadyError,
    OwnershipLostError,
    SessionBusyError,
    SessionClosedError,
    SessionNotFoundError,
    TurnNotFoundError,
)
from agentray.events import AnyEvent, Message, TurnOptions, decode_event
from agentray.ids import check_name, check_session_id, new_session_id, new_turn_id
from agentray.sessions.actor import SessionActor
from agentray.sessions.base import (
    Cursor,
    IfBusy,
    Placement,
    SessionInfo,
    StreamItem,
    TurnInfo,
    WaitingCall,
)
from agentray.sessions.following import Following
from agentray.sessions.infos import TurnSummary, session_info, turn_info
from agentray.sessions.ownership import Ownership
from agentray.sessions.residents import Residents
from agentray.sessions.stream import TailWriter, WireMessage
from agentray.storage.base import (
    Acceptance,
    Accepted,
    DurableStore,
    HotStore,
    ScratchStore,
    SessionRow,
    TurnBirth,
    TurnRow,
    WaitingStore,
    Wire,
)
from agentray.telemetry.logging import get_logger

__all__ = ["SessionService"]

log = get_logger(__name__)

Key = tuple[str, str]
Origin = Literal["session", "conversation", "response"]

# The year 10000, in seconds since the epoch: what PostgreSQL takes for a time.
_END_OF_TIME = 253_402_300_800.0

_encode = msgspec.json.Encoder().encode
_waiting = msgspec.json.Decoder(WaitingCall)


class SessionService:
    """``Sessions`` for one owner process. See ``base.py`` for what each method guarantees."""

    def __init__(
        self,
        *,
        store: DurableStore,
        scratch: ScratchStore,
        waiting: WaitingStore,
        hot: HotStore,
        wire: Wire,
        ownership: Ownership,
        residents: Residents,
        following: Following,
        tails: TailWriter,
        agents: Agents,
        check_model: Callable[[str], object],
        settings: SessionsSettings,
        clock: Clock,
        launch_dedicated: Callable[[str, str], Awaitable[None]],
    ) -> None:
        self._store = store
        self._scratch = scratch
        self._waiting = waiting
        self._hot = hot
        self._wire = wire
        self._ownership = ownership
        self._residents = residents
        self._following = following
        self._tails = tails
        self._agents = agents
        self._check_model = check_model
        self._settings = settings
        self._clock = clock
        self._launch_dedicated = launch_dedicated

    # Sessions

    async def create(
        self,
        tenant: str,
        *,
        session_id: str | None = None,
        agent: str | None = None,
        user: str | None = None,
        placement: Placement = "shared",
        ttl_s: float | None = None,
        metadata: dict[str, str] | None = None,
        origin: Origin = "session",
    ) -> tuple[SessionInfo, bool]:
        if session_id is not None:
            check_session_id(session_id, param="id")
        if user is not None:
            check_name(user, param="user")
        if ttl_s is not None and not 0 < ttl_s <= 3_153_600_000:
            raise InvalidRequestError("ttl_s must be a number of seconds above 0", param="ttl_s")
        agent = self._agents.default if agent is None else agent
        self._agents.get(agent)
        row = SessionRow(
            tenant=tenant,
            id=session_id or new_session_id(),
            agent=agent,
            user=user,
            placement=placement,
            origin=origin,
            metadata=metadata or {},
            parked_reason=None,
            created_at=0.0,
            updated_at=0.0,
            expires_at=None,
            expired=False,
            epoch=0,
            owner=None,
            owner_alive=False,
            last_seq=0,
            inbox=0,
            turns=0,
            open_turns=0,
            latest_turn=None,
        )
        stored, created = await self._store.create_session(row, ttl_s=ttl_s)
        return session_info(stored), created

    async def get(self, tenant: str, session_id: str) -> SessionInfo:
        return session_info(await self._row(tenant, session_id))

    async def _row(self, tenant: str, session_id: str) -> SessionRow:
        row = await self._store.session(tenant, session_id)
        if row is None:
            raise _not_found(session_id)
        return row

    async def list(
        self,
        tenant: str,
        *,
        user: str | None = None,
        agent: str | None = None,
        status: str | None = None,
        after: str | None = None,
        limit: int = 20,
    ) -> tuple[Sequence[SessionInfo], str | None]:
        if status not in (None, "idle", "running", "closed", "parked"):
            raise InvalidRequestError(
                "status must be one of idle, running, closed, parked", param="status"
            )
        if not 1 <= limit <= 100:
            raise InvalidRequestError("limit must be from 1 to 100", param="limit")
        rows = await self._store.sessions(
            tenant,
            user=user,
            agent=agent,
            status=status,
            before=_decode_page(after) if after is not None else None,
            limit=limit + 1,
        )
        more = rows[limit - 1] if len(rows) > limit else None
        following = f"{more.created_at!r}~{more.id}" if more is not None else None
        return [session_info(row) for row in rows[:limit]], following

    async def update(
        self, tenant: str, session_id: str, *, metadata: dict[str, str]
    ) -> SessionInfo:
        row = await self._store.update_metadata(tenant, session_id, metadata)
        if row is None:
            raise _not_found(session_id)
        return session_info(row)

    async def delete(self, tenant: str, session_id: str) -> None:
        row = await self._store.delete_session(tenant, session_id)
        if row is None:
            raise _not_found(session_id)
        self._hot.drop(tenant, session_id)
        actor = self._residents.find((tenant, session_id))
        if actor is not None:
            self._residents.lose(actor)
        elif row.owner is not None:
            message = WireMessage(kind="deleted", tenant=tenant, session_id=session_id)
            self._tails.send([row.owner], message)

    async def scratch(self, tenant: str, session_id: str) -> bytes | None:
        found = await self._scratch.read_scratch(tenant, session_id)
        if found is None:
            await self._row(tenant, session_id)
        return found

    async def fork(
        self, tenant: str, session_id: str, *, after_turn: str, new_id: str | None = None
    ) -> SessionInfo:
        await self._row(tenant, session_id)
        turn = await self._turn_row(tenant, session_id, after_turn)
        if turn.last_seq is None:
            raise SessionBusyError(f"turn {after_turn} has not ended", session_id=session_id)
        new_id = new_id or new_session_id()
        row = await self._store.fork_session(tenant, session_id, new_id, turn.last_seq)
        if row is None:
            raise _not_found(session_id)
        return session_info(row)

    # Turns

    async def submit(
        self,
        tenant: str,
        session_id: str,
        input: Sequence[Message],
        *,
        options: TurnOptions = TurnOptions(),
        if_busy: IfBusy = "enqueue",
        idempotency_key: str | None = None,
        after_turn: str | None = None,
    ) -> TurnInfo:
        if not input:
            raise InvalidRequestError("input must not be empty", param="input")
        if options.model is not None:
            self._check_model(options.model)
        if idempotency_key is not None:
            check_name(idempotency_key, param="idempotency_key")
        encoded_input, encoded_options = _encode(input), _encode(options)
        request_hash = hashlib.blake2b(encoded_input + encoded_options, digest_size=16).hexdigest()
        key = (tenant, session_id)
        turn_id = new_turn_id()
        actor = await self._residents.activate(key)
        if actor is not None and self._is_idle(actor, after_turn):
            if self._residents.running >= self._settings.max_running_turns:
                raise BackpressureError("this host runs as many turns as it may", retry_after_s=1)
            birth = TurnBirth(turn_id, idempotency_key, request_hash, encoded_options)
            first_seq = actor.state.seq + 1
            try:
                new = await self._residents.begin(actor, birth, input, options)
            except OwnershipLostError:
                # It may have landed all the same, or may yet land: the store knows it by its id.
                new = False
            if new:
                return _begun(actor, birth, input, options, self._clock.now(), first_seq)
        return await self._accept(
            Acceptance(
                tenant=tenant,
                session_id=session_id,
                turn_id=turn_id,
                idempotency_key=idempotency_key,
                request_hash=request_hash,
                input=encoded_input,
                options=encoded_options,
                if_busy=if_busy,
                after_turn=after_turn,
                max_queued=self._settings.max_queued_turns,
            )
        )

    def _is_idle(self, actor: SessionActor, after_turn: str | None) -> bool:
        expired = actor.expires_at is not None and actor.expires_at <= self._clock.now()
        outdated = after_turn is not None and actor.latest_turn != after_turn
        # The store decides, and words, what is refused.
        return not (
            actor.busy
            or actor.mailbox
            or actor.dropped
            or expired
            or outdated
            or self._residents.draining
        )

    async def _accept(self, acceptance: Acceptance) -> TurnInfo:
        session_id = acceptance.session_id
        accepted = await self._store.accept(acceptance)
        if accepted.outcome == "gone":
            raise _not_found(session_id)
        if accepted.outcome == "closed":
            raise SessionClosedError(
                f"session {session_id} is closed: its time to live is over", session_id=session_id
            )
        if accepted.outcome == "busy":
            raise SessionBusyError(f"session {session_id} runs a turn", session_id=session_id)
        if accepted.outcome == "outdated":
            raise SessionBusyError(
                f"turn {acceptance.after_turn} is not the latest of session {session_id}",
                session_id=session_id,
                outdated=True,
            )
        if accepted.outcome == "full":
            raise BackpressureError(
                f"{acceptance.max_queued} turns wait in session {session_id}", retry_after_s=1
            )
        assert accepted.turn is not None
        if accepted.outcome == "duplicate":
            return self._duplicate(session_id, accepted.turn, acceptance.request_hash)
        try:
            await self._wake(acceptance, accepted)
        except AgentRayError as error:
            # It is accepted all the same, and the sweep finds it.
            log.warning("wake_failed", session=session_id, error=str(error))
        return turn_info(session_id, accepted.turn, None)

    async def _wake(self, acceptance: Acceptance, accepted: Accepted) -> None:
        """See that an accepted turn is run soon. It is run in any case: the sweep finds it."""
        tenant, session_id = key = (acceptance.tenant, acceptance.session_id)
        if accepted.owner == self._ownership.owner_id:
            await self._residents.look_into_inbox(key)
        elif accepted.owner is not None and accepted.owner_alive:
            self._following.expect(key, accepted.owner, accepted.last_seq)
            message = WireMessage(
                kind="wake",
                tenant=tenant,
                session_id=session_id,
                sender=self._ownership.owner_id,
                # The turn itself saves its owner from asking; cancellations are looked up.
                turn=None if acceptance.if_busy == "interrupt" else accepted.turn,
                epoch=accepted.epoch,
                inbox=accepted.inbox,
            )
            self._tails.send([accepted.owner], message)
        elif accepted.placement == "dedicated":
            await self._launch_dedicated(tenant, session_id)
        elif self._ownership.may_take_over() or accepted.owner is None:
            await self._residents.activate(key)

    def _duplicate(self, session_id: str, row: TurnRow, request_hash: str) -> TurnInfo:
        if row.request_hash != request_hash:
            raise IdempotencyConflictError(
                f"the idempotency key was used for turn {row.id} with another input",
                turn_id=row.id,
            )
        return turn_info(session_id, row, None)

    async def _turn_row(self, tenant: str, session_id: str, turn_id: str) -> TurnRow:
        row = await self._store.turn(tenant, session_id, turn_id)
        if row is None:
            await self._row(tenant, session_id)
            raise TurnNotFoundError(
                f"session {session_id} has no turn {turn_id}", session_id=session_id
            )
        return row

    async def turn(self, tenant: str, session_id: str, turn_id: str) -> TurnInfo:
        row = await self._turn_row(tenant, session_id, turn_id)
        if row.first_seq is None:
            return turn_info(session_id, row, None)
        summary = TurnSummary(turn_id)
        after = row.first_seq - 1
        while summary.finished is None:
            bodies = await self._store.events(
                tenant, session_id, after=after, limit=1_000, up_to=row.last_seq
            )
            for body in bodies:
                summary.add(decode_event(body))
            if len(bodies) < 1_000:
                break
            after += len(bodies)
        info = turn_info(session_id, row, summary)
        if info.state != "running":
            return info
        found = await self._waiting.waiting(tenant, session_id)
        return msgspec.structs.replace(info, waiting=[_waiting.decode(place) for place in found])

    async def latest_turn(self, tenant: str, session_id: str) -> str | None:
        actor = self._residents.find((tenant, session_id))
        if actor is not None and not actor.busy:
            return actor.latest_turn
        return (await self._row(tenant, session_id)).latest_turn

    async def wait(self, tenant: str, session_id: str, turn_id: str) -> TurnInfo:
        summary = TurnSummary(turn_id)
        async for items in self.follow(tenant, session_id, turn_id=turn_id):
            for item in items:
                summary.add(item)
        return summary.info(session_id)

    async def cancel(self, tenant: str, session_id: str, turn_id: str | None = None) -> list[str]:
        ids, owner = await self._store.request_cancel(tenant, session_id, turn_id)
        if not ids:
            if turn_id is not None:
                await self._turn_row(tenant, session_id, turn_id)
            else:
                await self._row(tenant, session_id)
            return []
        actor = self._residents.find((tenant, session_id))
        if actor is not None:
            for each in ids:
                self._residents.cancel_here(actor, each)
            await self._residents.look_into_inbox(actor.key)
        elif owner is not None:
            message = WireMessage(kind="wake", tenant=tenant, session_id=session_id)
            self._tails.send([owner], message)
        return ids

    # Streams

    async def events(
        self,
        tenant: str,
        session_id: str,
        *,
        after: int = 0,
        limit: int = 100,
        turn_id: str | None = None,
    ) -> tuple[Sequence[AnyEvent], bool]:
        bodies = await self._store.events(tenant, session_id, after=after, limit=limit + 1)
        if not bodies:
            row = await self._row(tenant, session_id)
            self._following.check_cursor(Cursor(after), row.last_seq)
        events = [decode_event(body) for body in bodies[:limit]]
        if turn_id is not None:
            events = [event for event in events if event.turn_id == turn_id]
        return events, len(bodies) > limit

    def follow(
        self,
        tenant: str,
        session_id: str,
        *,
        after: Cursor = Cursor(0),
        turn_id: str | None = None,
    ) -> AsyncIterator[list[StreamItem]]:
        return self._following.follow((tenant, session_id), after, turn_id)

    def describe(self) -> dict[str, Any]:
        residents = self._residents
        return {
            "owner_id": self._ownership.owner_id,
            "resident": len(residents),
            "running": residents.running,
            "queued": residents.queued(),
            "draining": residents.draining,
            "store_ok": self._ownership.fresh(),
            "cache_ok": self._wire.available,
        }

    def check_ready(self) -> None:
        """Raise ``NotReadyError`` while this process should get no new work."""
        if self._residents.draining:
            raise NotReadyError("this host is draining", retry_after_s=1)


def _not_found(session_id: str) -> SessionNotFoundError:
    shown = session_id if len(session_id) <= 80 else session_id[:80] + "…"
    return SessionNotFoundError(f"there is no session {shown!r}", session_id=shown)


def _decode_page(after: str) -> tuple[float, str]:
    created_at, separator, session_id = after.partition("~")
    try:
        before = float(created_at)
        if not (separator and 0 <= before < _END_OF_TIME):
            raise ValueError(created_at)
    except ValueError as error:
        raise InvalidRequestError("after is not a cursor of this list", param="after") from error
    return before, check_session_id(session_id, param="after")


def _begun(
    actor: SessionActor,
    birth: TurnBirth,
    input: Sequence[Message],
    options: TurnOptions,
    now: float,
    first_seq: int,
) -> TurnInfo:
    return TurnInfo(
        id=birth.turn_id,
        session_id=actor.id,
        state="running",
        status=None,
        input=list(input),
        options=options,
        agent=actor.agent,
        idempotency_key=birth.idempotency_key,
        cancel_requested=False,
        accepted_at=now,
        finished_at=None,
        first_seq=first_seq,
        last_seq=None,
    )
