"""What the rooms above ask of the stores: records, and one protocol a tier."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Literal, Protocol

import msgspec

__all__ = [
    "Accepted",
    "Acceptance",
    "AnswerStore",
    "Append",
    "AppendResult",
    "Claim",
    "DurableStore",
    "FlightBegun",
    "HotCopy",
    "HotStore",
    "OpenTurn",
    "ResultStore",
    "ScratchStore",
    "SessionRow",
    "TurnBirth",
    "TurnRow",
    "WaitingStore",
    "Wire",
]


class TurnBirth(msgspec.Struct, frozen=True):
    """A turn that is accepted by the same append that begins to run it."""

    turn_id: str
    idempotency_key: str | None
    request_hash: str
    options: bytes


class Append(msgspec.Struct, frozen=True, kw_only=True):
    """Events of one session for its journal, and what they change in ``turns``.

    ``events`` are JSON, for ``first_seq``, ``first_seq + 1``, and so on. The append lands whole
    or not at all, and only if ``epoch`` is the session's and ``first_seq`` follows its last. With
    ``inbox`` it lands only if the session's is the same: no turn was accepted by others meanwhile.
    ``cost`` is that of the turn that ended, in US dollars.
    """

    tenant: str
    session_id: str
    epoch: int
    first_seq: int
    events: tuple[bytes, ...]
    inbox: int | None = None
    born: TurnBirth | None = None
    started_turn: str | None = None
    ended_turn: str | None = None
    ended_status: str | None = None
    cost: float = 0.0

    @property
    def last_seq(self) -> int:
        return self.first_seq + len(self.events) - 1


class AppendResult(msgspec.Struct, frozen=True):
    """What became of an append.

    ``landed``: committed. ``stale``: the fence refused it, the session has ``epoch`` and
    ``last_seq``. ``gone``: there is no such session. ``locked``: somebody holds its row, try
    again. ``duplicate``: ``born`` has an id or idempotency key that another turn has. ``mail``:
    the inbox is not the one named.
    """

    outcome: Literal["landed", "stale", "gone", "locked", "duplicate", "mail"]
    epoch: int = 0
    last_seq: int = 0


class SessionRow(msgspec.Struct, frozen=True, kw_only=True):
    """A row of ``sessions``; times in seconds since the epoch, by PostgreSQL's clock.

    ``cost`` is that of all turns that ended, in US dollars.
    """

    tenant: str
    id: str
    agent: str
    user: str | None
    placement: Literal["shared", "dedicated"]
    origin: Literal["session", "conversation", "response"]
    metadata: dict[str, str]
    parked_reason: str | None
    created_at: float
    updated_at: float
    expires_at: float | None
    expired: bool
    epoch: int
    owner: str | None
    owner_alive: bool
    last_seq: int
    inbox: int
    turns: int
    cost: float = 0.0
    open_turns: int
    latest_turn: str | None

    @property
    def first_epoch(self) -> int:
        """An epoch that no owner of an earlier session of this id can have had.

        Epochs begin at the milliseconds of the session's creation: whoever slept through its
        deletion, or a copy that survived it, is of an epoch that the new session never has.
        """
        return int(self.created_at * 1000)


class TurnRow(msgspec.Struct, frozen=True, kw_only=True):
    """A row of ``turns``. ``input`` is there only until the journal has it."""

    id: str
    ordinal: int
    state: Literal["accepted", "running", "done"]
    status: str | None
    idempotency_key: str | None
    request_hash: str
    input: bytes | None
    options: bytes
    cancel_requested: bool
    accepted_at: float
    finished_at: float | None
    first_seq: int | None
    last_seq: int | None


class OpenTurn(msgspec.Struct, frozen=True):
    """A turn that waits or runs and concerns an owner: new in its inbox, or to be cancelled."""

    tenant: str
    session_id: str
    turn_id: str
    state: Literal["accepted", "running"]
    cancel_requested: bool


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """A session that is ours from now on, with all of its turns that are not done, in order."""

    row: SessionRow
    turns: tuple[TurnRow, ...]
    previous_owner: str | None


class Acceptance(msgspec.Struct, frozen=True, kw_only=True):
    """A turn to accept for whoever owns the session."""

    tenant: str
    session_id: str
    turn_id: str
    idempotency_key: str | None
    request_hash: str
    input: bytes
    options: bytes
    if_busy: Literal["enqueue", "reject", "interrupt"]
    after_turn: str | None
    max_queued: int


class Accepted(msgspec.Struct, frozen=True, kw_only=True):
    """What became of an acceptance; ``owner`` is who should be woken, alive or not, and ``inbox``
    the session's count with this turn."""

    outcome: Literal["accepted", "duplicate", "busy", "outdated", "full", "closed", "gone"]
    owner: str | None = None
    owner_alive: bool = False
    placement: Literal["shared", "dedicated"] = "shared"
    last_seq: int = 0
    epoch: int = 0
    inbox: int = 0
    turn: TurnRow | None = None


class ScratchStore(Protocol):
    """The files that tools left in sessions: a tar for each of the last two calls that left any.

    A call is known by the ``seq`` of its first ``tool.called``: run again after a crash, it finds
    what it found before. All methods raise ``StorageUnavailableError``.
    """

    async def read_scratch(
        self, tenant: str, session_id: str, *, before_seq: int | None = None
    ) -> bytes | None:
        """Return what the last call left, or the last one in front of ``before_seq``."""
        ...

    async def write_scratch(
        self, tenant: str, session_id: str, *, epoch: int, seq: int, body: bytes
    ) -> bool:
        """Keep what a call left; False if the session is not at ``epoch`` any more."""
        ...


class DurableStore(Protocol):
    """The durable tier: sessions, turns, journals and owners. All else only hints.

    Every method raises ``StorageUnavailableError`` when the store cannot be reached or the
    answer was lost, in which case the change may have been made or not.
    """

    async def append(self, appends: Sequence[Append]) -> list[AppendResult]:
        """Append to many journals in one statement; at most one append for a session."""
        ...

    async def create_session(
        self,
        row: SessionRow,
        *,
        ttl_s: float | None,
        owner: str | None = None,
    ) -> tuple[SessionRow, bool]:
        """Insert a session, owned by ``owner`` at epoch 1 if given; or return the existing one."""
        ...

    async def session(self, tenant: str, session_id: str) -> SessionRow | None: ...

    async def sessions(
        self,
        tenant: str,
        *,
        user: str | None,
        agent: str | None,
        status: str | None,
        before: tuple[float, str] | None,
        limit: int,
    ) -> list[SessionRow]:
        """Return sessions, newest first."""
        ...

    async def update_metadata(
        self, tenant: str, session_id: str, metadata: dict[str, str]
    ) -> SessionRow | None: ...

    async def delete_session(self, tenant: str, session_id: str) -> SessionRow | None:
        """Delete a session, its turns and its journal; return the row that was."""
        ...

    async def fork_session(
        self, tenant: str, session_id: str, new_id: str, up_to_seq: int
    ) -> SessionRow | None:
        """Copy a session's events and done turns up to a ``seq`` into a new session."""
        ...

    async def accept(self, acceptance: Acceptance) -> Accepted:
        """Accept a turn durably for whoever owns the session."""
        ...

    async def turn(self, tenant: str, session_id: str, turn_id: str) -> TurnRow | None: ...

    async def turn_by_key(self, tenant: str, session_id: str, key: str) -> TurnRow | None: ...

    async def request_cancel(
        self, tenant: str, session_id: str, turn_id: str | None
    ) -> tuple[list[str], str | None]:
        """Mark open turns for cancelling; return their ids and the session's owner."""
        ...

    async def events(
        self, tenant: str, session_id: str, *, after: int, limit: int, up_to: int | None = None
    ) -> list[bytes]:
        """Return events behind ``after`` as JSON, in order."""
        ...

    async def recent_events(self, tenant: str, session_id: str, *, turns: int) -> list[bytes]:
        """Return the events of the last ``turns`` turns that began, as JSON, in order."""
        ...

    async def claim(
        self,
        tenant: str,
        session_id: str,
        owner: str,
        *,
        placement: Literal["shared", "dedicated"],
        term_s: float,
    ) -> Claim | None:
        """Take a session of a placement that has no live owner; None if there is none to take."""
        ...

    async def release(
        self, tenant: str, session_id: str, *, epoch: int, inbox: int
    ) -> Literal["released", "inbox", "lost"]:
        """Give a session up, unless its inbox moved since; ``lost`` if it is no longer ours."""
        ...

    async def park(self, tenant: str, session_id: str, *, epoch: int, reason: str) -> None:
        """Mark a session as not to be brought back, with the reason, and give it up."""
        ...

    async def open_turns(
        self, tenant: str, session_id: str, *, epoch: int
    ) -> tuple[int, tuple[TurnRow, ...]] | None:
        """Return a session's inbox count and its turns not done; None if not ours any more."""
        ...

    async def inbox(self, owner: str) -> list[OpenTurn]:
        """Return turns that wait in, or are to be cancelled in, sessions of an owner."""
        ...

    async def orphans(
        self, *, term_s: float, limit: int
    ) -> list[tuple[str, str, Literal["shared", "dedicated"]]]:
        """Return (tenant, session id, placement) of sessions with open turns and no live owner."""
        ...

    async def epochs(self, sessions: Sequence[tuple[str, str]]) -> dict[tuple[str, str], int]:
        """Return the current epochs of sessions that exist."""
        ...

    async def beat(self, owner: str, *, kind: str, address: str) -> None:
        """Write an owner's heartbeat by the store's clock."""
        ...

    async def forget_owner(self, owner: str) -> None:
        """Remove an owner that released all that it had."""
        ...

    async def ping(self) -> None: ...

    async def close(self) -> None: ...


class HotCopy(msgspec.Struct, frozen=True):
    """A session's state as of ``seq``, at the end of a turn: what is shown to the model."""

    epoch: int
    seq: int
    turns: int
    window: tuple[bytes, ...]
    cost: float = 0.0


class HotStore(Protocol):
    """The hot tier. It may forget everything at any time; no method raises for that."""

    async def load(self, tenant: str, session_id: str) -> HotCopy | None: ...

    def save(self, tenant: str, session_id: str, copy: HotCopy, *, newest: int) -> None:
        """Store, in the background, a copy whose last ``newest`` window entries are new.

        A copy never replaces one of a later epoch or ``seq``.
        """
        ...

    def drop(self, tenant: str, session_id: str) -> None:
        """Remove a session's copy, in the background."""
        ...

    def forget(self, tenant: str, session_id: str) -> None:
        """Forget what this process knows of a session's copy, which stays where it is."""
        ...


class WaitingStore(Protocol):
    """What of a session waits in the tool pool's queue. It may forget; no method raises."""

    async def put_waiting(
        self, tenant: str, session_id: str, call_id: str, place: bytes | None
    ) -> None:
        """Note the place of a call, or with None that it waits no longer."""
        ...

    async def waiting(self, tenant: str, session_id: str) -> list[bytes]:
        """Return the places of a session's calls."""
        ...


class Wire(Protocol):
    """Messages between owners, and the text of calls in flight. Losing any of it is allowed."""

    @property
    def available(self) -> bool: ...

    async def write_tails(self, tails: Sequence[tuple[str, int, bytes]]) -> bool:
        """Write (key, byte offset, text) of calls in flight; False if it could not be done."""
        ...

    async def read_tail(self, key: str) -> bytes | None:
        """Return the text of a call in flight, or None where it is lost or has a hole.

        A server that does not answer is asked again for some seconds.
        """
        ...

    async def publish(self, messages: Sequence[tuple[str, bytes]]) -> None:
        """Send (owner id, message) to other owners."""
        ...

    def listen(self, owner: str) -> AsyncIterator[bytes]:
        """Yield the messages for an owner; reconnects by itself."""
        ...


class FlightBegun(msgspec.Struct, frozen=True):
    """What is to be done about a call.

    ``answer``: nothing, its answer is there. ``leads``: make it, and say how it ended. ``waits``:
    another makes it now; ask again. ``alone``: make it without telling anybody, because its
    answer cannot be shared.
    """

    outcome: Literal["answer", "leads", "waits", "alone"]
    answer: bytes = b""


class AnswerStore(Protocol):
    """Answers by the digest of what was asked, and which of them are being fetched, by a flight.

    Everything in it may be lost at any time. Every method raises ``StorageUnavailableError``,
    within the store's own time limit.
    """

    async def begin_flight(self, key: str, flight: str, *, term_s: float) -> FlightBegun:
        """Return the answer, or enter a flight that will bring it; one of all that ask leads.

        The flight is forgotten ``term_s`` behind its last sign of life.
        """
        ...

    async def renew_flight(self, key: str, flight: str, *, term_s: float) -> bool:
        """Give a sign of life; False if the flight does not lead any more."""
        ...

    async def put(self, key: str, flight: str, answer: bytes) -> None:
        """Store an answer, and end the flight if it leads."""
        ...

    async def end_flight(self, key: str, flight: str, *, alone_s: float = 0.0) -> None:
        """End a flight without an answer, if it leads: the next that asks will lead.

        With ``alone_s``, whoever asks within that time is told to call alone.
        """
        ...


class ResultStore(AnswerStore, Protocol):
    """An ``AnswerStore`` whose answers are too old when whoever asks says so."""

    async def begin_flight(
        self, key: str, flight: str, *, term_s: float, age_s: float | None = None
    ) -> FlightBegun:
        """As an ``AnswerStore`` does; an answer of ``age_s`` is none, nor is one that the store
        itself forgets."""
        ...
