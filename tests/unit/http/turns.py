"""Turns as a session's stream shows them, made by hypothesis: events and deltas in order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from agentray.events import (
    AnyEvent,
    Message,
    ModelCalled,
    ModelFailed,
    ModelFinished,
    ModelVoided,
    ToolCall,
    ToolCalled,
    ToolFinished,
    TurnAccepted,
    TurnError,
    TurnFinished,
    TurnOptions,
    TurnResumed,
    Usage,
)
from agentray.sessions.base import Delta, StreamItem, TurnInfo

TURN = "01hzy3v9q8w7e6r5t4y3p2a1s0"
SESSION = "sess_1"
AT = 1_700_000_000.0
TEXTS = st.text(st.sampled_from('abc é😀\n"\\'), min_size=1, max_size=6)


def turn_info(**changes: Any) -> TurnInfo:
    """Return a turn that runs."""
    facts: dict[str, Any] = {
        "id": TURN,
        "session_id": SESSION,
        "state": "running",
        "status": None,
        "input": [Message("user", "hi")],
        "options": TurnOptions(),
        "agent": "assistant",
        "idempotency_key": None,
        "cancel_requested": False,
        "accepted_at": AT,
        "finished_at": None,
        "first_seq": 1,
        "last_seq": None,
    }
    return TurnInfo(**(facts | changes))


@dataclass
class Script:
    """A turn that is written down: ``items`` is what a client that was there all along saw."""

    first: int = 1
    items: list[StreamItem] = field(default_factory=list)

    def add(self, kind: type, **fields: Any) -> int:
        """Append an event and return its seq."""
        seq = self.first + len(self.events)
        self.items.append(kind(seq=seq, turn_id=TURN, at=AT, **fields))
        return seq

    @property
    def events(self) -> list[AnyEvent]:
        return [item for item in self.items if not isinstance(item, Delta)]

    def show(self, called: int, known: int, chunks: list[str]) -> int:
        """Append deltas behind the first ``known`` characters of a step; return their end."""
        for chunk in chunks:
            known += len(chunk)
            self.items.append(Delta(TURN, called, known, chunk))
        return known


@st.composite
def scripts(draw: st.DrawFn) -> Script:
    """Draw a whole turn: steps with attempts that fail, go on or begin anew, and tool calls."""
    script = Script(first=draw(st.integers(1, 3)))
    script.add(TurnAccepted, input=[Message("user", "hi")], agent="assistant")
    for step in range(1, draw(st.integers(1, 3)) + 1):
        ended = _step(draw, script, step, last=False)
        if ended is not None:
            script.add(TurnFinished, status=ended, error=_error(ended))
            return script
    ended = _step(draw, script, 4, last=True)
    script.add(TurnFinished, status=ended or "completed", error=_error(ended), usage=Usage(5, 3, 1))
    return script


def _error(status: str | None) -> TurnError | None:
    return None if status in (None, "completed") else TurnError("model_unavailable", "gone")


def _step(draw: st.DrawFn, script: Script, step: int, *, last: bool) -> str | None:
    kept = ""
    for attempt in range(1, 5):
        called = script.add(
            ModelCalled, step=step, attempt=attempt, model="m", continued_from=len(kept)
        )
        shown = draw(st.lists(TEXTS, max_size=4))
        script.show(called, len(kept), shown)
        if draw(st.booleans()):
            script.add(TurnResumed, phase="streaming", epoch=2, owner="o")
        # What the event that ends the attempt knows may be more than what was shown.
        text = kept + "".join(shown) + draw(st.one_of(st.just(""), TEXTS))
        where = {"step": step, "attempt": attempt, "text": text}
        how = draw(st.sampled_from(["finish", "again", "anew", "fail", "cancel"]))
        if how == "again" and text and attempt < 4:
            script.add(ModelVoided, **where, reason="stalled", continues=True)
            kept = text
            if draw(st.integers(0, 9)) == 0:
                return "cancelled"
        elif how == "anew" and attempt < 4:
            script.add(ModelVoided, **where, reason="stalled")
            kept = ""
        elif how == "fail":
            script.add(ModelFailed, **where, error=TurnError("model_unavailable", "gone"))
            return "failed"
        elif how == "cancel":
            script.add(ModelVoided, **where, reason="cancelled")
            return "cancelled"
        else:
            return _finish(draw, script, where, last=last)
    raise AssertionError


def _finish(draw: st.DrawFn, script: Script, where: dict[str, Any], *, last: bool) -> str | None:
    if last:
        reason = draw(st.sampled_from(["stop", "length"]))
        script.add(ModelFinished, **where, finish_reason=reason)
        return "incomplete" if reason == "length" else None
    calls = [ToolCall(f"call_{k}", "echo", "{}") for k in range(draw(st.integers(1, 3)))]
    script.add(ModelFinished, **where, finish_reason="tool_calls", tool_calls=calls)
    for call in calls:
        script.add(ToolCalled, call_id=call.call_id, name=call.name, arguments=call.arguments)
    for call in draw(st.permutations(calls)):
        if draw(st.integers(0, 9)) == 0:
            return "cancelled"
        if draw(st.booleans()):
            script.add(
                ToolCalled,
                call_id=call.call_id,
                name=call.name,
                arguments=call.arguments,
                attempt=2,
            )
        status = draw(st.sampled_from(["ok", "error", "unknown"]))
        script.add(ToolFinished, call_id=call.call_id, name=call.name, status=status, output="o")
    return None


def cut_again(items: list[StreamItem], data: st.DataObject) -> list[StreamItem]:
    """Return what another client saw: the same text in other pieces, or only in the events."""
    seen: list[StreamItem] = []
    waiting: list[Delta] = []
    for item in [*items, None]:
        if isinstance(item, Delta):
            waiting.append(item)
            continue
        if waiting:
            text = "".join(delta.text for delta in waiting)
            known = waiting[0].offset - len(waiting[0].text)
            ends = data.draw(st.lists(st.integers(1, len(text)), max_size=4, unique=True))
            start = 0
            for end in sorted(ends):
                seen.append(Delta(TURN, waiting[0].seq, known + end, text[start:end]))
                start = end
            waiting = []
        if item is not None:
            seen.append(item)
    return seen
