"""Decide about the model calls of a step: what the router is told, and when to try again. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from agentray.config.settings import AgentSettings
from agentray.events import ModelFailed, ModelVoided, TurnError
from agentray.models.policies import Step, difficulty, step_kind
from agentray.models.usage import BYTES_PER_TOKEN, has_image, prompt_bytes
from agentray.sessions.state import CONTEXT_LENGTH, Rules, SessionState, Turn

__all__ = [
    "after_lost_call",
    "output_schema",
    "shown_window",
    "step_of",
    "time_left_s",
    "tokens_left",
]

_FRUGAL_FROM = 0.8
STEP_TIMEOUT = "step_timeout"
STEP_COST = "step_cost_cap"


def step_of(
    state: SessionState,
    turn: Turn,
    agent: AgentSettings,
    *,
    preferred: str | None,
    tools: int,
    minds_images: bool,
    compares: bool,
    rules: Rules,
) -> Step:
    """Return what the router is to know of the turn's next model call.

    ``preferred`` is the model to be taken if it can be, ``tools`` the number of those offered.
    Images are only looked for if a model ``minds_images``; difficulty is only estimated if the
    router ``compares`` models, and size if it does or a step's cost is capped.
    """
    asked = turn.messages[0]
    schema = output_schema(turn, agent) is not None
    kind = step_kind(asked, step=turn.step, tools=bool(tools), output_schema=schema)
    window = state.window
    cap, session_budget = rules.step_cost_cap, rules.session_budget
    spent = state.cost + turn.cost
    size = 0
    if compares or cap is not None:
        size = prompt_bytes(window) + prompt_bytes(turn.messages) + len(turn.text)
        size += len(agent.instructions)
    return Step(
        kind=kind,
        difficulty=difficulty(
            kind, asked, tools=tools, turns=state.turns, failed_tools=turn.failed_tools
        )
        if compares
        else 0.0,
        prompt_tokens=size // BYTES_PER_TOKEN,
        output_tokens=turn.options.max_output_tokens or agent.max_output_tokens,
        images=minds_images and any(map(has_image, (*window, asked))),
        tools=bool(tools),
        output_schema=schema,
        forced=turn.options.model,
        allowed=() if turn.options.model else agent.models,
        preferred=preferred,
        # The results of tools go to the model that has seen the ones before.
        kept=turn.model if turn.step > 2 and turn.model not in turn.lost else None,
        goes_on=turn.model if turn.text else None,
        lost=turn.lost,
        overflowed=turn.overflowed,
        escalated=turn.escalated,
        budget=None if cap is None else max(0.0, cap - turn.step_cost),
        session_left=None if session_budget is None else max(0.0, session_budget - spent),
        frugal=session_budget is not None and spent >= _FRUGAL_FROM * session_budget,
    )


def output_schema(turn: Turn, agent: AgentSettings) -> dict[str, object] | None:
    """Return the JSON schema that the turn's answer has to follow, if there is one."""
    asked = turn.options.output_schema
    return agent.output_schema if asked is None else asked


def shown_window(window: Sequence[bytes], turn: Turn, model: str) -> Sequence[bytes]:
    """Return the past turns that are shown to a model: the younger half to one whose context
    window was too short for all of them."""
    return window[(len(window) + 1) // 2 :] if turn.overflowed == model else window


def may_go_on(turn: Turn, cost: float, now: float, rules: Rules) -> bool:
    """Return whether the step has time and money for another call behind one that cost ``cost``."""
    cap = rules.step_cost_cap
    late = now - turn.step_at >= rules.step_timeout_s
    return not late and (cap is None or turn.step_cost + cost < cap)


def time_left_s(turn: Turn, rules: Rules, now: float) -> float:
    """Return what is left of the step's time; a little at least, so that a call can fail by it."""
    return max(0.05, rules.step_timeout_s - (now - turn.step_at))


def tokens_left(limit: int | None, text: str) -> int | None:
    """Return what a limit of tokens leaves to a call that goes on behind a text: one at least.

    How many tokens the text was is not known: a broken stream does not tell.
    """
    if limit is None or not text:
        return limit
    return max(1, limit - len(text.encode()) // BYTES_PER_TOKEN)


def after_lost_call(
    turn: Turn,
    *,
    error: TurnError,
    may_pass: bool,
    text: str,
    continues: bool,
    cost: float,
    now: float,
    rules: Rules,
    unsent: bool = False,
) -> ModelVoided | ModelFailed:
    """Return the event of an attempt that a model lost: voided to try again, or failed.

    ``may_pass`` says that another attempt, of this model or of another one, may succeed. ``text``
    is what the step had streamed, ``cost`` what the attempt cost in US dollars. A step makes no
    more attempts than it may, none behind its time, and none when it has cost what it may; one
    that did not fit the context window is tried once more, with a longer or emptier one. The
    event's ``seq`` is for the caller to set.
    """
    at = {"step": turn.step, "attempt": turn.attempt, "turn_id": turn.id, "seq": 0, "at": now}
    again = may_pass and (unsent or turn.failures + 1 < rules.model_attempts)
    if error.code == CONTEXT_LENGTH:
        again = turn.overflowed is None
        continues = False
    if again and now - turn.step_at >= rules.step_timeout_s:
        again = False
        message = f"the step's {rules.step_timeout_s:g} s are over; last: {error.message}"
        error = TurnError(STEP_TIMEOUT, message)
    if again and rules.step_cost_cap is not None and turn.step_cost + cost >= rules.step_cost_cap:
        again = False
        message = f"the step's {rules.step_cost_cap:g} dollars are spent; last: {error.message}"
        error = TurnError(STEP_COST, message)
    if again:
        return ModelVoided(
            **at,  # type: ignore[arg-type]
            reason=error.code,
            text=text,
            continues=continues and bool(text),
            unsent=unsent,
            cost=cost,
        )
    return ModelFailed(**at, error=error, text=text, cost=cost)  # type: ignore[arg-type]
