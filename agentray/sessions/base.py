"""What the doors (HTTP, Python handles, dedicated actors) may ask of a process's sessions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal, Protocol

import msgspec

from agentray.events import (
    AnyEvent,
    Message,
    ModelCalled,
    TurnError,
    TurnOptions,
    TurnResumed,
    TurnStatus,
    Usage,
)

__all__ = [
    "Cursor",
    "Delta",
    "IfBusy",
    "Placement",
    "SessionInfo",
    "Sessions",
    "StreamItem",
    "TurnInfo",
    "WaitingCall",
    "item_cursor",
]

IfBusy = Literal["enqueue", "reject", "interrupt"]
Placement = Literal["shared", "dedicated"]
TurnState = Literal["accepted", "running", "done"]


class Cursor(msgspec.Struct, frozen=True, order=True):
    """A place in a session's stream: all of event ``seq`` and, if a model call is under way there,
    the first ``offset`` characters of its step's text. ``Cursor(0)`` is the start.
    """

    seq: int
    offset: int = 0


class Delta(msgspec.Struct, frozen=True):
    """Text of a running model call, which the event ``model.called`` numbered ``seq`` began.

    ``text`` ends ``offset`` characters into the text of the step: an attempt that continues
    another one begins at its ``continued_from``. Deltas of an attempt are contiguous.
    """

    turn_id: str
    seq: int
    offset: int
    text: str

    @property
    def cursor(self) -> Cursor:
        return Cursor(self.seq, self.offset)


StreamItem = AnyEvent | Delta


def item_cursor(item: StreamItem, before: Cursor) -> Cursor:
    """Return the cursor behind an item of a stream that came behind ``before``."""
    if isinstance(item, Delta):
        # The rest of a lost call's text comes behind the takeover that found it.
        return Cursor(max(item.seq, before.seq), item.offset)
    if isinstance(item, ModelCalled):
        return Cursor(item.seq, item.continued_from)
    # A takeover ends no call: how much of its text was seen is still to be known.
    return Cursor(item.seq, before.offset if isinstance(item, TurnResumed) else 0)


class SessionInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A session at rest or in memory; times in seconds since the epoch."""

    id: str
    tenant: str
    agent: str
    user: str | None
    placement: Placement
    metadata: dict[str, str]
    status: Literal["idle", "running", "closed", "parked"]
    parked_reason: str | None
    created_at: float
    updated_at: float
    expires_at: float | None
    last_seq: int
    turns: int
    origin: Literal["session", "conversation", "response"]


class WaitingCall(msgspec.Struct, frozen=True):
    """A tool call that waits for a worker: ``position`` is 1 for the one that is likely
    to begin next, and in about ``wait_s`` it begins; as of the time ``at``."""

    call_id: str
    tool: str
    position: int
    wait_s: float
    at: float


class TurnInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A turn as the ``turns`` table has it; ``first_seq`` and ``last_seq`` bound its events.

    ``waiting`` has its tool calls that wait for a worker, as far as that is known.
    """

    id: str
    session_id: str
    state: TurnState
    status: TurnStatus | None
    input: list[Message]
    options: TurnOptions
    agent: str
    idempotency_key: str | None
    cancel_requested: bool
    accepted_at: float
    finished_at: float | None
    first_seq: int | None
    last_seq: int | None
    text: str | None = None
    error: TurnError | None = None
    usage: Usage | None = None
    waiting: list[WaitingCall] = []


class Sessions(Protocol):
    """A process's view of all sessions of the cluster.

    Whatever is asked, the session may live here, in another process or nowhere: the answer is
    the same. All methods raise ``StorageUnavailableError`` while PostgreSQL is away, but for
    what waits for a turn's end and a turn that begins in a session in memory: those go on when
    it is back. ``tenant`` scopes every id: another tenant's session is not found.
    """

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
        origin: Literal["session", "conversation", "response"] = "session",
    ) -> tuple[SessionInfo, bool]:
        """Make a session; return it and whether it is new (an existing id returns that one).

        Raises:
            InvalidRequestError: for an impossible id, an unknown agent or a bad field.
        """
        ...

    async def get(self, tenant: str, session_id: str) -> SessionInfo:
        """Return a session. Raises ``SessionNotFoundError``."""
        ...

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
        """Return a page of sessions, newest first, and the cursor of the next page, if any."""
        ...

    async def update(
        self, tenant: str, session_id: str, *, metadata: dict[str, str]
    ) -> SessionInfo:
        """Replace a session's metadata and return it. Raises ``SessionNotFoundError``."""
        ...

    async def delete(self, tenant: str, session_id: str) -> None:
        """Delete a session and everything of it. Raises ``SessionNotFoundError``."""
        ...

    async def scratch(self, tenant: str, session_id: str) -> bytes | None:
        """Return the files that the session's tools left, as a tar; None if there are none.

        Raises:
            SessionNotFoundError: there is no such session.
        """
        ...

    async def fork(
        self, tenant: str, session_id: str, *, after_turn: str, new_id: str | None = None
    ) -> SessionInfo:
        """Make a new session with the events of the old one up to the end of ``after_turn``.

        Raises:
            SessionNotFoundError, TurnNotFoundError: if there is no such session or turn.
            SessionBusyError: if that turn has not ended.
        """
        ...

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
        """Accept a turn; once this returned, the turn runs to its end, whatever dies.

        With an idempotency key that was used before in this session, the turn accepted then is
        returned and nothing happens. With ``after_turn``, the turn is accepted only if that turn
        is still the session's latest. Cancelling the caller after acceptance cancels nothing.

        Raises:
            SessionNotFoundError, SessionClosedError, SessionParkedError: as they say.
            SessionBusyError: ``if_busy="reject"`` and a turn runs or waits; or ``after_turn`` is
                no longer the latest.
            IdempotencyConflictError: the key was used with another input.
            BackpressureError: too many turns wait.
            InvalidRequestError: unknown model, or a bad option.
        """
        ...

    async def turn(self, tenant: str, session_id: str, turn_id: str) -> TurnInfo:
        """Return a turn. Raises ``SessionNotFoundError`` or ``TurnNotFoundError``."""
        ...

    async def latest_turn(self, tenant: str, session_id: str) -> str | None:
        """Return the id of the session's latest accepted turn, or None."""
        ...

    async def wait(self, tenant: str, session_id: str, turn_id: str) -> TurnInfo:
        """Return the turn when it is done. Leaving early cancels nothing but the waiting.

        Raises:
            SessionNotFoundError, TurnNotFoundError, SessionParkedError: as for ``follow``.
        """
        ...

    def follow(
        self,
        tenant: str,
        session_id: str,
        *,
        after: Cursor = Cursor(0),
        turn_id: str | None = None,
    ) -> AsyncIterator[list[StreamItem]]:
        """Yield what comes after the cursor, first what was missed, then live, in batches.

        Events come in the order of their ``seq`` without gap or repetition. Text of a running
        call comes as deltas behind its ``model.called``: put together, those of a step are its
        text, whatever was live and whatever came from the journal. With ``turn_id``, only that
        turn's items come and the iterator ends behind its ``turn.finished``; a turn that waits
        in the queue is waited for. Without, it never ends by itself. Where to go on behind an
        item says ``item_cursor``.

        Raises:
            SessionNotFoundError, TurnNotFoundError: before the first item.
            SessionParkedError: with ``turn_id``, if that turn cannot go on.
            CursorError: the cursor lies in the future.
        """
        ...

    async def events(
        self,
        tenant: str,
        session_id: str,
        *,
        after: int = 0,
        limit: int = 100,
        turn_id: str | None = None,
    ) -> tuple[Sequence[AnyEvent], bool]:
        """Return committed events behind ``seq`` ``after``, and whether there are more."""
        ...

    async def cancel(self, tenant: str, session_id: str, turn_id: str | None = None) -> list[str]:
        """Request the end of a turn, or of all that run or wait; return the ids concerned.

        A turn that is done already is left as it is and not among the ids.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Return facts about this process for ``/readyz`` and ``agentray status``:
        ``owner_id``, ``resident``, ``running``, ``queued``, ``draining``, ``store_ok``,
        ``cache_ok``."""
        ...
