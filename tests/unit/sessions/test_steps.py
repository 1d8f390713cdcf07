"""What is decided about a step's model calls."""

from __future__ import annotations

from typing import Any

from agentray.events import ModelFailed, ModelVoided, TurnError
from agentray.sessions.state import OWNER_LOST
from agentray.sessions.steps import after_lost_call
from tests.unit.sessions.story import BROKEN, Story

# Lost calls


def lose(
    story: Story,
    *,
    may_pass: bool = True,
    text: str = "",
    continues: bool = False,
    error: TurnError = BROKEN,
    cost: float = 0.0,
    now: float = 0.0,
) -> Any:
    return after_lost_call(
        story.turn,
        error=error,
        may_pass=may_pass,
        text=text,
        continues=continues,
        cost=cost,
        now=now,
        rules=story.rules,
    )


def test_a_lost_call_is_tried_again_as_often_as_the_rules_say() -> None:
    story = Story().accepted()
    for attempt in (1, 2):
        event = lose(story.called(attempt), text="x")
        assert isinstance(event, ModelVoided)
        assert (event.attempt, event.text, event.reason) == (attempt, "x", "model_unavailable")
        story.voided("x", continues=False)
    event = lose(story.called(3), text="y")
    assert isinstance(event, ModelFailed)
    assert (event.error, event.text) == (BROKEN, "y")


def test_attempts_that_died_with_their_owner_do_not_count_as_the_models() -> None:
    story = Story().accepted()
    for attempt in (1, 2, 3):
        story.called(attempt).resumed("model").voided("", continues=False, reason=OWNER_LOST)
    assert isinstance(lose(story.called(4)), ModelVoided)


def test_a_call_that_the_model_refused_for_good_is_not_tried_again() -> None:
    assert isinstance(lose(Story().accepted().called(), may_pass=False), ModelFailed)


def test_nothing_streamed_is_nothing_to_continue() -> None:
    story = Story().accepted().called()
    assert not lose(story, text="", continues=True).continues
    assert lose(story, text="x", continues=True).continues
