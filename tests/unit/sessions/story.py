"""A session told by its events, for tests of what is decided."""

from __future__ import annotations

import json
from typing import Any

from agentray.events import (
    AnyEvent,
    Message,
    ModelCalled,
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
    decode_event,
    encode_event,
)
from agentray.memory.window import join
from agentray.sessions.state import (
    Command,
    Rules,
    SessionState,
    Turn,
    advance,
)

__all__ = ["BROKEN", "RULES", "A", "B", "Story"]

RULES = Rules(window_turns=2, max_steps=2, model_attempts=3, recovery_attempts=2)
BROKEN = TurnError("model_unavailable", "it broke")
A, B = ToolCall("a", "again", "{}"), ToolCall("b", "once", '{"x":1}')


class Story:
    """A session told by its events; ``commands`` are what followed from the last one."""

    def __init__(self, rules: Rules = RULES) -> None:
        self.rules = rules
        self.state = SessionState()
        self.commands: tuple[Command, ...] = ()
        self.events: list[AnyEvent] = []
        self.now = 0.0
        self._turns = 0

    @property
    def turn(self) -> Turn:
        assert self.state.turn is not None
        return self.state.turn

    def tell(self, kind: type[Any], **fields: Any) -> Story:
        event = kind(seq=self.state.seq + 1, turn_id=f"turn{self._turns}", at=self.now, **fields)
        # As the journal keeps it.
        event = decode_event(encode_event(event))
        self.state, self.commands = advance(self.state, event, self.rules)
        self.events.append(event)
        return self

    def accepted(self, content: Any = "hi", **options: Any) -> Story:
        self._turns += 1
        return self.tell(
            TurnAccepted,
            input=[Message("user", content)],
            agent="assistant",
            options=TurnOptions(**options),
        )

    def called(
        self, attempt: int = 1, step: int = 1, continued_from: int = 0, model: str = "m"
    ) -> Story:
        return self.tell(
            ModelCalled, step=step, attempt=attempt, model=model, continued_from=continued_from
        )

    def answered(
        self, text: str = "yes", *calls: ToolCall, reason: str = "stop", **how: Any
    ) -> Story:
        return self.tell(
            ModelFinished,
            step=self.turn.step,
            attempt=self.turn.attempt,
            text=text,
            finish_reason=reason,
            tool_calls=list(calls),
            usage=Usage(10, 2, 1),
            **how,
        )

    def voided(
        self,
        text: str = "",
        *,
        continues: bool = False,
        reason: str = "model_unavailable",
        **how: Any,
    ) -> Story:
        return self.tell(
            ModelVoided,
            step=self.turn.step,
            attempt=self.turn.attempt,
            reason=reason,
            text=text,
            continues=continues,
            **how,
        )

    def tool_called(self, call: ToolCall, attempt: int = 1) -> Story:
        return self.tell(
            ToolCalled,
            call_id=call.call_id,
            name=call.name,
            arguments=call.arguments,
            attempt=attempt,
        )

    def tool_finished(self, call: ToolCall, output: str = "done", *, status: str = "ok") -> Story:
        return self.tell(
            ToolFinished, call_id=call.call_id, name=call.name, status=status, output=output
        )

    def resumed(self, phase: str = "accepted") -> Story:
        return self.tell(TurnResumed, phase=phase, epoch=7, owner="o")

    def finished(self, status: str = "completed", cost: float = 0.0) -> Story:
        return self.tell(TurnFinished, status=status, cost=cost)

    def window(self) -> list[Any]:
        return json.loads(b"[" + join(self.state.window) + b"]")
