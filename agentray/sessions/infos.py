"""Turn rows and events into what callers are shown of sessions and turns."""

from __future__ import annotations

import msgspec

from agentray.events import (
    Message,
    ModelFailed,
    ModelFinished,
    ModelVoided,
    TurnAccepted,
    TurnFinished,
    TurnOptions,
)
from agentray.sessions.base import Delta, SessionInfo, StreamItem, TurnInfo
from agentray.storage.base import SessionRow, TurnRow

__all__ = ["TurnSummary", "session_info", "turn_info"]

_inputs = msgspec.json.Decoder(list[Message])
_options = msgspec.json.Decoder(TurnOptions)


def session_info(row: SessionRow) -> SessionInfo:
    """Return a session as its row has it."""
    status = (
        "parked"
        if row.parked_reason is not None
        else "running"
        if row.open_turns
        else "closed"
        if row.expired
        else "idle"
    )
    return SessionInfo(
        id=row.id,
        tenant=row.tenant,
        agent=row.agent,
        user=row.user,
        placement=row.placement,
        metadata=row.metadata,
        status=status,
        parked_reason=row.parked_reason,
        created_at=row.created_at,
        updated_at=row.updated_at,
        expires_at=row.expires_at,
        last_seq=row.last_seq,
        turns=row.turns,
        origin=row.origin,
    )


class TurnSummary:
    """What a turn's events say about it, gathered one by one."""

    def __init__(self, turn_id: str) -> None:
        self.turn_id = turn_id
        self.accepted: TurnAccepted | None = None
        self.finished: TurnFinished | None = None
        self.text: str | None = None

    def add(self, item: StreamItem) -> None:
        """Take an item of the session's stream in."""
        if isinstance(item, Delta) or item.turn_id != self.turn_id:
            return
        if isinstance(item, ModelFinished):
            self.text = item.text or self.text
        elif isinstance(item, ModelVoided | ModelFailed) and item.text:
            self.text = item.text
        elif isinstance(item, TurnAccepted):
            self.accepted = item
        elif isinstance(item, TurnFinished):
            self.finished = item

    def info(self, session_id: str) -> TurnInfo:
        """Return the turn, of which all events were added."""
        accepted, finished = self.accepted, self.finished
        assert accepted is not None
        assert finished is not None
        return TurnInfo(
            id=self.turn_id,
            session_id=session_id,
            state="done",
            status=finished.status,
            input=accepted.input,
            options=accepted.options,
            agent=accepted.agent,
            idempotency_key=None,
            cancel_requested=finished.status == "cancelled",
            accepted_at=accepted.at,
            finished_at=finished.at,
            first_seq=accepted.seq,
            last_seq=finished.seq,
            text=self.text,
            error=finished.error,
            usage=finished.usage,
        )


def turn_info(session_id: str, row: TurnRow, summary: TurnSummary | None) -> TurnInfo:
    """Return a turn as its row has it, with what its events add."""
    accepted = summary.accepted if summary else None
    finished = summary.finished if summary else None
    return TurnInfo(
        id=row.id,
        session_id=session_id,
        state=row.state,
        status=row.status,  # type: ignore[arg-type]
        input=accepted.input if accepted else _inputs.decode(row.input or b"[]"),
        options=_options.decode(row.options),
        agent=accepted.agent if accepted else "",
        idempotency_key=row.idempotency_key,
        cancel_requested=row.cancel_requested,
        # The journal's times, where there are some: every way to ask gives the same answer.
        accepted_at=accepted.at if accepted else row.accepted_at,
        finished_at=finished.at if finished else row.finished_at,
        first_seq=row.first_seq,
        last_seq=row.last_seq,
        text=summary.text if summary else None,
        error=finished.error if finished else None,
        usage=finished.usage if finished else None,
    )
