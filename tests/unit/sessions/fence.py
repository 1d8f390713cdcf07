"""The rules of the durable tier for one session, reduced to what decides who may write."""

from __future__ import annotations

from msgspec.structs import replace

from agentray.events import AnyEvent, TurnAccepted, decode_event
from agentray.sessions.actor import SessionActor
from agentray.sessions.state import Rules, SessionState
from agentray.storage.base import Append, AppendResult, SessionRow, TurnRow

__all__ = ["Fence", "actor_of", "row_of"]

FIRST_EPOCH = 100


def actor_of(epoch: int, inbox: int, state: SessionState, rules: Rules) -> SessionActor:
    """Return a session in memory, as an owner has it behind a claim."""
    return SessionActor(row_of(epoch, inbox, state), state, rules)


def row_of(epoch: int, inbox: int, state: SessionState) -> SessionRow:
    """Return a session's row, as its owner wrote it last."""
    return SessionRow(
        tenant="t",
        id="s",
        agent="assistant",
        user=None,
        placement="shared",
        origin="session",
        metadata={},
        parked_reason=None,
        created_at=0.0,
        updated_at=0.0,
        expires_at=None,
        expired=False,
        epoch=epoch,
        owner="me",
        owner_alive=True,
        last_seq=state.seq,
        inbox=inbox,
        turns=state.turns,
        cost=state.cost,
        open_turns=0,
        latest_turn=None,
    )


class Fence:
    """One session's row, turns and journal. Every method is one atomic statement."""

    def __init__(self) -> None:
        self.epoch = FIRST_EPOCH
        self.owner: str | None = None
        self.last_seq = 0
        self.cost = 0.0
        self.inbox = 0
        self.turns: dict[str, TurnRow] = {}
        self.journal: list[tuple[int, AnyEvent]] = []
        self.owner_of: dict[int, str] = {}
        self.silent: set[str] = set()
        """Owners whose last beat is older than the term."""

    def open(self) -> list[TurnRow]:
        return [row for row in self.turns.values() if row.state != "done"]

    def claim(self, owner: str, seen: int) -> bool:
        if self.epoch != seen or not (self.owner is None or self.owner in {owner, *self.silent}):
            return False
        self.epoch += 1
        self.owner = owner
        self.owner_of[self.epoch] = owner
        return True

    def release(self, epoch: int, inbox: int) -> str:
        if self.epoch != epoch:
            return "lost"
        if self.inbox != inbox:
            return "inbox"
        self.owner = None
        return "released"

    def accept(self, turn_id: str) -> None:
        if turn_id not in self.turns:
            self.inbox += 1
            self._insert(turn_id, "accepted", None)

    def cancel(self, turn_id: str) -> None:
        row = self.turns[turn_id]
        if row.state != "done":
            self.turns[turn_id] = replace(row, cancel_requested=True)

    def append(self, append: Append) -> AppendResult:
        at = (self.epoch, self.last_seq)
        if append.epoch != self.epoch or append.first_seq != self.last_seq + 1:
            return AppendResult("stale", *at)
        if append.inbox is not None and append.inbox != self.inbox:
            return AppendResult("mail", *at)
        if append.born is not None:
            if append.born.turn_id in self.turns:
                return AppendResult("duplicate", *at)
            self._insert(append.born.turn_id, "running", append.first_seq)
        if (started := append.started_turn) is not None:
            row = self.turns[started]
            self.turns[started] = replace(row, state="running", first_seq=append.first_seq)
        if (ended := append.ended_turn) is not None:
            row = self.turns[ended]
            self.turns[ended] = replace(
                row, state="done", status=append.ended_status, last_seq=append.last_seq
            )
        self.cost += append.cost
        self.journal += [(append.epoch, decode_event(body)) for body in append.events]
        self.last_seq = append.last_seq
        return AppendResult("landed", self.epoch, self.last_seq)

    def _insert(self, turn_id: str, state: str, first_seq: int | None) -> None:
        self.turns[turn_id] = TurnRow(
            id=turn_id,
            ordinal=len(self.turns) + 1,
            state="running" if state == "running" else "accepted",
            status=None,
            idempotency_key=None,
            request_hash="",
            input=b"[]",
            options=b"{}",
            cancel_requested=False,
            accepted_at=0.0,
            finished_at=None,
            first_seq=first_seq,
            last_seq=None,
        )

    def begun(self) -> list[str]:
        """Return the turns of the journal in the order in which they began."""
        return [e.turn_id for _, e in self.journal if isinstance(e, TurnAccepted)]
