"""Decide what a session does next: ``(state, event) -> (state, commands)``, without any I/O.

A session is a fold over the events of its journal. ``advance`` takes one event and says what has
to be done because of it; ``resume`` says what a new owner has to do with what it found. Only
``runtime.py`` carries commands out, and each ends in further events::

    turn.accepted ─▶ CallModel ─▶ model.called ─▶ RunModel … model.finished ─▶ EndTurn
                        ▲  ▲                         │            │               │
                        │  └────── model.voided ─────┘            │         turn.finished
                        └─ tool.finished … tool.called ◀─ CallTools
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import msgspec
from msgspec.structs import replace

from agentray.errors import ModelContextLengthError, SessionsError
from agentray.events import (
    AnyEvent,
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
    TurnStatus,
    Usage,
)
from agentray.memory.window import (
    answer_fragment,
    input_fragment,
    join,
    tool_calls_fragment,
    tool_result_fragment,
)

__all__ = [
    "CANCELLED",
    "CONTEXT_LENGTH",
    "OWNER_LOST",
    "CallModel",
    "CallTools",
    "Command",
    "EndTurn",
    "JournalCorruptError",
    "Phase",
    "RecoverModel",
    "Rules",
    "RunModel",
    "SessionState",
    "SettleUnknown",
    "ToolState",
    "Turn",
    "advance",
    "fold",
    "resume",
]

Phase = Literal["accepted", "model", "tools", "finishing"]

OWNER_LOST = "owner_lost"
"""The reason of an attempt that was voided because its session's owner died."""

CONTEXT_LENGTH = ModelContextLengthError.code
"""The reason of an attempt whose prompt did not fit the model's context window."""


class JournalCorruptError(SessionsError):
    """An event that cannot follow the ones before it."""

    code = "journal_corrupt"


class Rules(msgspec.Struct, frozen=True):
    """The bounds that an agent and the platform set for a turn, and what its session may cost
    before it gets the cheapest models, in US dollars."""

    window_turns: int = 20
    max_steps: int = 16
    model_attempts: int = 3
    recovery_attempts: int = 5
    step_timeout_s: float = 300.0
    step_cost_cap: float | None = None
    session_budget: float | None = None


class ToolState(msgspec.Struct, frozen=True):
    """A tool call of the current step; ``attempt`` is 0 until it was dispatched, ``called_seq``
    is of the event that says so of the first attempt."""

    call: ToolCall
    attempt: int = 0
    called_seq: int = 0
    settled: bool = False
    output: str = ""


class Turn(msgspec.Struct, frozen=True):
    """The turn that runs.

    ``messages`` are the fragments of its input and of its settled steps. ``text`` is what the
    step's voided attempts left to be continued, ``partial`` what they had streamed in any case.
    ``failures`` counts attempts of this step that models lost, ``lost`` names those models, and
    ``takeovers`` counts those of owners since something was last settled. ``model`` is the one
    that was called last, ``hedged`` if another one may have answered in its place, ``overflowed``
    the one whose context window was too short for this turn. ``escalated``: an answer of this step
    failed its checks. The step began at ``step_at`` and cost ``step_cost`` US dollars so far, the
    turn ``cost``.
    """

    id: str
    agent: str
    options: TurnOptions
    messages: tuple[bytes, ...]
    phase: Phase = "accepted"
    step: int = 1
    attempt: int = 0
    called_seq: int = 0
    failures: int = 0
    takeovers: int = 0
    text: str = ""
    partial: str = ""
    calls_fragment: bytes = b""
    tools: tuple[ToolState, ...] = ()
    failed_tools: int = 0
    usage: Usage = Usage()
    end: EndTurn | None = None
    model: str = ""
    lost: tuple[str, ...] = ()
    overflowed: str | None = None
    escalated: bool = False
    hedged: bool = False
    step_at: float = 0.0
    step_cost: float = 0.0
    cost: float = 0.0


class CallModel(msgspec.Struct, frozen=True):
    """Journal ``model.called``; ``continued_from`` characters of its text are there already."""

    step: int
    attempt: int
    continued_from: int = 0


class RunModel(msgspec.Struct, frozen=True):
    """Run the call that the journal has, and journal how it ended."""


class RecoverModel(msgspec.Struct, frozen=True):
    """Void the attempt that was lost with its owner, behind the ``tail`` that it had streamed."""

    tail: str


class CallTools(msgspec.Struct, frozen=True):
    """Journal ``tool.called`` for each, then dispatch them at once."""

    calls: tuple[tuple[ToolCall, int], ...]


class SettleUnknown(msgspec.Struct, frozen=True):
    """Journal that a call's outcome is unknown."""

    call: ToolCall


class EndTurn(msgspec.Struct, frozen=True):
    """Journal ``turn.finished``."""

    status: TurnStatus
    error: TurnError | None = None


Command = CallModel | RunModel | RecoverModel | CallTools | SettleUnknown | EndTurn


class SessionState(msgspec.Struct, frozen=True):
    """All that a session needs to go on. ``window`` has a fragment for each past turn shown,
    ``cost`` is that of the turns that ended, in US dollars."""

    seq: int = 0
    turns: int = 0
    window: tuple[bytes, ...] = ()
    turn: Turn | None = None
    cost: float = 0.0


CANCELLED = EndTurn("cancelled", TurnError("cancelled", "the turn was cancelled"))

NOT_RUN = "The turn ended before this call was run."
NOT_SETTLED = "The turn ended while this call ran. Whether it took effect is unknown."

_NOTHING: tuple[Command, ...] = ()
_RUN: tuple[Command, ...] = (RunModel(),)


def advance(
    state: SessionState, event: AnyEvent, rules: Rules
) -> tuple[SessionState, tuple[Command, ...]]:
    """Return the state after an event, and what has to be done because of it.

    Raises:
        JournalCorruptError: the event cannot follow the state.
    """
    if event.seq != state.seq + 1:
        raise JournalCorruptError(
            f"event {event.seq} follows {state.seq}", seq=event.seq, last_seq=state.seq
        )
    turn = state.turn
    if isinstance(event, TurnAccepted):
        if turn is not None:
            raise JournalCorruptError(f"{event.turn_id} begins while {turn.id} runs")
        begun = Turn(event.turn_id, event.agent, event.options, (input_fragment(event.input),))
        return (
            SessionState(event.seq, state.turns + 1, state.window, begun, state.cost),
            (CallModel(1, 1),),
        )
    if turn is None or turn.id != event.turn_id:
        raise JournalCorruptError(f"event {event.seq} belongs to no running turn")
    if isinstance(event, TurnFinished):
        shown = (*state.window, _past(turn))[-rules.window_turns :]
        cost = state.cost + event.cost
        return SessionState(event.seq, state.turns, shown, None, cost), _NOTHING
    turn, commands = _IN_TURN[type(event)](turn, event, rules)
    return SessionState(event.seq, state.turns, state.window, turn, state.cost), commands


def _past(turn: Turn) -> bytes:
    """Return what stays of a turn: its settled steps, and what of the last one was cut short."""
    cut_short: list[bytes] = []
    if turn.tools:
        # A call without a result is no valid conversation, and what ran must not be forgotten.
        results = [
            tool.output if tool.settled else NOT_SETTLED if tool.attempt else NOT_RUN
            for tool in turn.tools
        ]
        cut_short = [turn.calls_fragment, *_results(turn, results)]
    elif turn.partial:
        cut_short = [answer_fragment(turn.partial)]
    return join([*turn.messages, *cut_short])


def _results(turn: Turn, outputs: Iterable[str]) -> list[bytes]:
    return [
        tool_result_fragment(tool.call.call_id, output)
        for tool, output in zip(turn.tools, outputs, strict=True)
    ]


def _model_called(turn: Turn, event: ModelCalled, rules: Rules) -> tuple[Turn, tuple[Command, ...]]:
    if turn.phase != "accepted" or (event.step, event.attempt) != (turn.step, turn.attempt + 1):
        raise JournalCorruptError(
            f"step {event.step} attempt {event.attempt} begins in phase {turn.phase}, "
            f"step {turn.step} attempt {turn.attempt}"
        )
    step_at = turn.step_at if turn.attempt else event.at
    return (
        replace(
            turn,
            phase="model",
            attempt=event.attempt,
            called_seq=event.seq,
            model=event.model,
            hedged=event.route is not None and event.route.hedge is not None,
            step_at=step_at,
        ),
        _RUN,
    )


def _model_voided(turn: Turn, event: ModelVoided, rules: Rules) -> tuple[Turn, tuple[Command, ...]]:
    _expect_attempt(turn, event.step, event.attempt)
    model = event.model or turn.model
    overflowed = event.reason == CONTEXT_LENGTH
    by_model = event.reason != OWNER_LOST and not overflowed and not event.escalates
    turn = replace(
        turn,
        phase="accepted",
        text=event.text if event.continues else "",
        partial=event.text,
        failures=turn.failures + (by_model and not event.unsent),
        model=model,
        lost=(*turn.lost, model) if by_model and not event.continues else turn.lost,
        overflowed=model if overflowed else turn.overflowed,
        escalated=turn.escalated or event.escalates,
        step_cost=turn.step_cost + event.cost,
        cost=turn.cost + event.cost,
    )
    return turn, (CallModel(turn.step, turn.attempt + 1, len(turn.text)),)


def _model_failed(turn: Turn, event: ModelFailed, rules: Rules) -> tuple[Turn, tuple[Command, ...]]:
    _expect_attempt(turn, event.step, event.attempt)
    turn = replace(turn, partial=event.text, cost=turn.cost + event.cost)
    return _ending(turn, EndTurn("failed", event.error))


def _model_finished(
    turn: Turn, event: ModelFinished, rules: Rules
) -> tuple[Turn, tuple[Command, ...]]:
    _expect_attempt(turn, event.step, event.attempt)
    turn = replace(
        turn,
        text="",
        partial="",
        failures=0,
        takeovers=0,
        attempt=0,
        usage=turn.usage + event.usage,
        model=event.model or turn.model,
        lost=(),
        escalated=False,
        step_cost=0.0,
        cost=turn.cost + event.cost,
    )
    if event.tool_calls:
        tools = tuple(ToolState(call) for call in event.tool_calls)
        turn = replace(
            turn,
            phase="tools",
            tools=tools,
            calls_fragment=tool_calls_fragment(event.text, event.tool_calls),
        )
        return turn, (CallTools(tuple((call, 1) for call in event.tool_calls)),)
    turn = replace(turn, messages=(*turn.messages, answer_fragment(event.text)))
    if event.finish_reason == "length":
        error = TurnError("max_output_tokens", "the answer reached its limit of tokens")
        return _ending(turn, EndTurn("incomplete", error))
    if event.finish_reason == "content_filter":
        error = TurnError("content_filter", "the model's provider withheld the answer")
        return _ending(turn, EndTurn("incomplete", error))
    return _ending(turn, EndTurn("completed"))


def _tool_called(turn: Turn, event: ToolCalled, rules: Rules) -> tuple[Turn, tuple[Command, ...]]:
    found = _tool(turn, event.call_id)
    called_seq = found.called_seq or event.seq
    return _with_tool(turn, replace(found, attempt=event.attempt, called_seq=called_seq)), _NOTHING


def _tool_finished(
    turn: Turn, event: ToolFinished, rules: Rules
) -> tuple[Turn, tuple[Command, ...]]:
    found = _tool(turn, event.call_id)
    turn = _with_tool(turn, replace(found, settled=True, output=event.output))
    failed = turn.failed_tools + (event.status == "error")
    turn = replace(turn, takeovers=0, failed_tools=failed)
    if not all(tool.settled for tool in turn.tools):
        return turn, _NOTHING
    results = _results(turn, [tool.output for tool in turn.tools])
    turn = replace(
        turn,
        phase="accepted",
        messages=(*turn.messages, join([turn.calls_fragment, *results])),
        calls_fragment=b"",
        tools=(),
    )
    if turn.step >= rules.max_steps:
        error = TurnError("max_steps", f"the turn made its {rules.max_steps} model calls")
        return _ending(turn, EndTurn("incomplete", error))
    turn = replace(turn, step=turn.step + 1)
    return turn, (CallModel(turn.step, 1),)


def _turn_resumed(turn: Turn, event: TurnResumed, rules: Rules) -> tuple[Turn, tuple[Command, ...]]:
    # Time in which nobody owned the turn is not the step's.
    return replace(turn, takeovers=turn.takeovers + 1, step_at=event.at), _NOTHING


_IN_TURN: dict[type, Callable[..., tuple[Turn, tuple[Command, ...]]]] = {
    ModelCalled: _model_called,
    ModelVoided: _model_voided,
    ModelFailed: _model_failed,
    ModelFinished: _model_finished,
    ToolCalled: _tool_called,
    ToolFinished: _tool_finished,
    TurnResumed: _turn_resumed,
}


def _ending(turn: Turn, end: EndTurn) -> tuple[Turn, tuple[Command, ...]]:
    return replace(turn, phase="finishing", end=end), (end,)


def _expect_attempt(turn: Turn, step: int, attempt: int) -> None:
    if turn.phase != "model" or (step, attempt) != (turn.step, turn.attempt):
        raise JournalCorruptError(
            f"step {step} attempt {attempt} ended in phase {turn.phase}, "
            f"step {turn.step} attempt {turn.attempt}"
        )


def _tool(turn: Turn, call_id: str) -> ToolState:
    for tool in turn.tools:
        if tool.call.call_id == call_id:
            if tool.settled:
                raise JournalCorruptError(f"tool call {call_id!r} is settled already")
            return tool
    raise JournalCorruptError(f"no tool call {call_id!r} is pending")


def _with_tool(turn: Turn, changed: ToolState) -> Turn:
    same = changed.call.call_id
    tools = tuple(changed if tool.call.call_id == same else tool for tool in turn.tools)
    return replace(turn, tools=tools)


def fold(state: SessionState, events: Iterable[AnyEvent], rules: Rules) -> SessionState:
    """Return the state after events whose commands were carried out by somebody else."""
    for event in events:
        state, _ = advance(state, event, rules)
    return state


def resume(
    turn: Turn,
    rules: Rules,
    on_crash: Callable[[str], Literal["retry", "report"]],
    *,
    tail: str = "",
    cancelled: bool = False,
) -> tuple[Command, ...]:
    """Return what a new owner has to do with a turn that it found, behind ``turn.resumed``.

    ``tail`` is what is left of the text of a call that ran. A settled tool call is never run again;
    one that had begun is decided by ``on_crash``. A turn that was cancelled, or taken over too
    often, ends; what of an answer was shown is kept.
    """
    if turn.end is not None:
        return (turn.end,)
    ends: tuple[Command, ...] = ()
    if cancelled:
        ends = (CANCELLED,)
    elif turn.takeovers > rules.recovery_attempts:
        message = f"no progress in {turn.takeovers} takeovers"
        ends = (EndTurn("failed", TurnError("recovery_exhausted", message)),)
    if turn.phase == "model":
        return (RecoverModel(tail), *ends)
    if ends:
        return ends
    if turn.phase == "tools":
        pending = [tool for tool in turn.tools if not tool.settled]
        again = [t for t in pending if t.attempt == 0 or on_crash(t.call.name) == "retry"]
        unknown = [t for t in pending if t not in again]
        commands: list[Command] = [SettleUnknown(tool.call) for tool in unknown]
        if again:
            commands.append(CallTools(tuple((t.call, t.attempt + 1) for t in again)))
        return tuple(commands)
    return (CallModel(turn.step, turn.attempt + 1, len(turn.text)),)
