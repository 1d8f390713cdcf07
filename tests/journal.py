"""A session's journal as tests read it, and what must hold of every journal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agentray.events import (
    AnyEvent,
    ModelCalled,
    ModelFailed,
    ModelFinished,
    ModelVoided,
    ToolCalled,
    ToolFinished,
    TurnAccepted,
    TurnFinished,
    TurnResumed,
    decode_event,
)
from agentray.sessions.state import Rules, SessionState, fold

__all__ = ["Journal", "TurnEvents"]


@dataclass(frozen=True)
class TurnEvents:
    """The events of one turn, each with the epoch that wrote it."""

    id: str
    entries: list[tuple[int, AnyEvent]]

    @property
    def events(self) -> list[AnyEvent]:
        return [event for _, event in self.entries]

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def status(self) -> str | None:
        ends = self.of(TurnFinished)
        return ends[0].status if ends else None

    @property
    def text(self) -> str:
        """The answer: the text of the last step that has any."""
        texts = [event.text for event in self.of(ModelFinished) if event.text]
        return texts[-1] if texts else ""

    def epoch_of(self, seq: int) -> int:
        return next(epoch for epoch, event in self.entries if event.seq == seq)


@dataclass(frozen=True)
class Journal:
    """The rows of ``events``, ``turns`` and ``sessions`` of one session."""

    session_id: str
    entries: list[tuple[int, int, AnyEvent]]
    turn_rows: list[tuple[Any, ...]]
    last_seq: int
    epoch: int
    owner: str | None
    turn_count: int
    parked_reason: str | None
    cost: float

    @classmethod
    def read(cls, sql: Callable[..., list[tuple[Any, ...]]], session_id: str) -> Journal:
        # The session first: what is committed meanwhile makes the rest longer, never shorter.
        [session] = sql(
            "SELECT last_seq, epoch, owner, turns, parked_reason, cost FROM sessions WHERE id = %s",
            session_id,
        )
        turns = sql(
            "SELECT id, state, status, first_seq, last_seq, input FROM turns"
            " WHERE session_id = %s ORDER BY ordinal",
            session_id,
        )
        rows = sql(
            "SELECT seq, epoch, body FROM events WHERE session_id = %s ORDER BY seq", session_id
        )
        entries = [(seq, epoch, decode_event(body)) for seq, epoch, body in rows]
        return cls(session_id, entries, turns, *session)

    @property
    def events(self) -> list[AnyEvent]:
        return [event for _, _, event in self.entries]

    def turns(self) -> list[TurnEvents]:
        """Return the turns in the order in which they began."""
        turns: dict[str, TurnEvents] = {}
        for _, epoch, event in self.entries:
            turn = turns.setdefault(event.turn_id, TurnEvents(event.turn_id, []))
            turn.entries.append((epoch, event))
        return list(turns.values())

    def turn(self, turn_id: str) -> TurnEvents:
        return next(turn for turn in self.turns() if turn.id == turn_id)

    def assert_sound(self) -> None:
        """Assert the invariants, of a session in which no turn waits or runs."""
        name = self.session_id
        seqs = [seq for seq, _, _ in self.entries]
        assert seqs == list(range(1, len(seqs) + 1)), f"{name}: seq has gaps: {seqs}"
        assert seqs == [event.seq for event in self.events], f"{name}: seq of row and event differ"
        assert self.last_seq == len(seqs), f"{name}: last_seq {self.last_seq}, {len(seqs)} events"
        epochs = [epoch for _, epoch, _ in self.entries]
        assert epochs == sorted(epochs), f"{name}: an older epoch wrote later: {epochs}"
        assert not epochs or epochs[-1] <= self.epoch
        # The state machine itself takes every event, and ends with no turn.
        end = fold(SessionState(), self.events, Rules())
        assert end.turn is None, f"{name}: turn {end.turn.id} has not ended"
        turns = self.turns()
        for turn in turns:
            _assert_turn_sound(name, turn)
        assert end.turns == self.turn_count == len(turns), f"{name}: turns were counted wrongly"
        assert abs(end.cost - self.cost) < 1e-9, f"{name}: its turns cost {end.cost}"
        self._assert_rows_agree(turns)

    def _assert_rows_agree(self, turns: list[TurnEvents]) -> None:
        name = self.session_id
        rows = {row[0]: row[1:] for row in self.turn_rows}
        assert len(rows) == len(self.turn_rows)
        assert rows.keys() == {turn.id for turn in turns}, f"{name}: turns without events, or so"
        for turn in turns:
            row = rows[turn.id]
            first, last = turn.events[0].seq, turn.events[-1].seq
            assert row == ("done", turn.status, first, last, None), (name, turn.id, row)


def _assert_turn_sound(session: str, turn: TurnEvents) -> None:
    name = f"{session}, turn {turn.id}"
    events = turn.events
    seqs = [event.seq for event in events]
    assert seqs == list(range(seqs[0], seqs[0] + len(seqs))), f"{name}: another turn is inside"
    assert isinstance(events[0], TurnAccepted), name
    assert isinstance(events[-1], TurnFinished), name
    assert len(turn.of(TurnAccepted)) == len(turn.of(TurnFinished)) == 1, name
    _assert_takeovers_are_told(name, turn)
    _assert_text_goes_on(name, turn)
    _assert_tools_run_once(name, turn)


def _assert_takeovers_are_told(name: str, turn: TurnEvents) -> None:
    before = turn.entries[0][0]
    for epoch, event in turn.entries[1:]:
        if isinstance(event, TurnResumed):
            assert event.epoch == epoch > before, f"{name}: {event} after epoch {before}"
        else:
            assert epoch == before, f"{name}: epoch {epoch} wrote {event} without a takeover"
        before = epoch


def _assert_text_goes_on(name: str, turn: TurnEvents) -> None:
    """A continued attempt begins where the voided one ended; the whole begins with the part."""
    part = ""
    for event in turn.events:
        if isinstance(event, ModelCalled):
            assert event.continued_from == len(part), f"{name}: {event} behind {part!r}"
        elif isinstance(event, ModelVoided):
            assert event.text.startswith(part), f"{name}: {event} behind {part!r}"
            part = event.text if event.continues else ""
        elif isinstance(event, ModelFinished | ModelFailed):
            assert event.text.startswith(part), f"{name}: {event} behind {part!r}"
            part = ""


def _assert_tools_run_once(name: str, turn: TurnEvents) -> None:
    """Each call that a model asked for is settled once, and never begun again after that."""
    pending: dict[str, int] = {}
    resumed = False
    for event in turn.events:
        if isinstance(event, ModelFinished):
            assert not pending, f"{name}: {pending} not settled before the next step"
            pending = {call.call_id: 0 for call in event.tool_calls}
            resumed = False
        elif isinstance(event, TurnResumed):
            resumed = True
        elif isinstance(event, ToolCalled):
            assert event.call_id in pending, f"{name}: {event} is settled, or was never asked for"
            pending[event.call_id] += 1
            assert event.attempt == pending[event.call_id], f"{name}: {event}"
            assert event.attempt == 1 or resumed, f"{name}: {event} without a takeover"
        elif isinstance(event, ToolFinished):
            assert event.call_id in pending, f"{name}: {event} is settled already"
            del pending[event.call_id]
    assert not pending or turn.status == "cancelled", f"{name}: {pending} never settled"
