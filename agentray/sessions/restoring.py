"""Fold a session's state from its hot copy and its journal."""

from __future__ import annotations

from collections.abc import Sequence

from agentray.events import AnyEvent, TurnFinished, decode_event
from agentray.sessions.state import JournalCorruptError, Rules, SessionState, fold
from agentray.storage.base import DurableStore, HotCopy, SessionRow

__all__ = ["is_usable", "restore"]

_PAGE = 1_000


def is_usable(copy: HotCopy, row: SessionRow) -> bool:
    """Return whether a hot copy is of this session and of nothing that the journal lacks."""
    return copy.seq <= row.last_seq and copy.epoch >= row.first_epoch


async def restore(
    store: DurableStore, row: SessionRow, copy: HotCopy | None, rules: Rules
) -> SessionState:
    """Return the state at ``row.last_seq``: the copy, if there is a usable one, and the events
    behind it; else the last turns alone, so that a long history costs no more than a short one.

    Raises:
        JournalCorruptError, msgspec.MsgspecError: the journal cannot be folded.
        StorageError: it cannot be read.
    """
    if copy is not None:
        window = copy.window[-rules.window_turns :]
        state = SessionState(copy.seq, copy.turns, window, cost=copy.cost)
        while state.seq < row.last_seq:
            bodies = await store.events(
                row.tenant, row.id, after=state.seq, limit=_PAGE, up_to=row.last_seq
            )
            state = fold(state, _decode(bodies, row), rules)
        return state
    if row.last_seq == 0:
        return SessionState()
    events = _decode(
        await store.recent_events(row.tenant, row.id, turns=rules.window_turns + 1), row
    )
    begun = sum(event.__struct_config__.tag == "turn.accepted" for event in events)
    spent = sum(event.cost for event in events if isinstance(event, TurnFinished))
    base = SessionState(seq=events[0].seq - 1, turns=row.turns - begun, cost=row.cost - spent)
    return fold(base, events, rules)


def _decode(bodies: Sequence[bytes], row: SessionRow) -> list[AnyEvent]:
    if not bodies:  # or it was deleted by now, and parking it changes nothing
        raise JournalCorruptError(f"events up to {row.last_seq} are missing", session_id=row.id)
    return [decode_event(body) for body in bodies]
