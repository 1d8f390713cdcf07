"""What a session does next, event by event."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from msgspec.structs import replace

from agentray.events import (
    ModelCalled,
    ModelFailed,
    ToolCall,
    Usage,
)
from agentray.sessions.state import (
    CANCELLED,
    CONTEXT_LENGTH,
    OWNER_LOST,
    CallModel,
    CallTools,
    Command,
    EndTurn,
    JournalCorruptError,
    RecoverModel,
    RunModel,
    SessionState,
    SettleUnknown,
    advance,
    fold,
    resume,
)
from tests.unit.sessions.story import BROKEN, RULES, A, B, Story


def on_crash(tool: str) -> Literal["retry", "report"]:
    return "retry" if tool == "again" else "report"


def resume_of(story: Story, *, tail: str = "", cancelled: bool = False) -> tuple[Command, ...]:
    return resume(story.turn, story.rules, on_crash, tail=tail, cancelled=cancelled)


# The way of a turn


def test_an_accepted_turn_calls_the_model() -> None:
    story = Story().accepted()
    assert story.commands == (CallModel(1, 1),)
    assert story.turn.phase == "accepted"


def test_a_journaled_call_is_run() -> None:
    story = Story().accepted().called()
    assert story.commands == (RunModel(),)
    assert (story.turn.phase, story.turn.called_seq) == ("model", 2)


def test_an_answer_ends_the_turn_and_enters_the_window() -> None:
    story = Story().accepted("hi").called().answered("yes")
    assert story.commands == (EndTurn("completed"),)
    story.finished()
    assert story.commands == ()
    assert story.state.turn is None
    assert story.window() == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
    ]


@pytest.mark.parametrize(
    ("reason", "code"), [("length", "max_output_tokens"), ("content_filter", "content_filter")]
)
def test_an_answer_that_was_cut_is_incomplete(reason: str, code: str) -> None:
    [end] = Story().accepted().called().answered(reason=reason).commands
    assert isinstance(end, EndTurn)
    assert end.status == "incomplete"
    assert end.error is not None
    assert end.error.code == code


def test_tools_asked_for_at_once_are_called_at_once() -> None:
    story = Story().accepted().called().answered("", A, B)
    assert story.commands == (CallTools(((A, 1), (B, 1))),)


def test_the_model_is_called_again_when_the_last_result_is_there() -> None:
    story = Story().accepted().called().answered("", A, B).tool_called(A).tool_called(B)
    assert story.tool_finished(B).commands == ()
    assert story.tool_finished(A).commands == (CallModel(2, 1),)
    assert story.turn.step == 2


def test_results_follow_their_calls_in_the_order_of_the_calls() -> None:
    story = Story().accepted().called().answered("let me see", A, B).tool_called(A).tool_called(B)
    story.tool_finished(B, "of b").tool_finished(A, "of a").called(step=2).answered("so").finished()
    _, asked, of_a, of_b, answer = story.window()
    assert asked["content"] == "let me see"
    assert [call["id"] for call in asked["tool_calls"]] == ["a", "b"]
    assert (of_a["tool_call_id"], of_a["content"]) == ("a", "of a")
    assert (of_b["tool_call_id"], of_b["content"]) == ("b", "of b")
    assert answer["content"] == "so"


def test_a_turn_that_made_its_model_calls_is_incomplete() -> None:
    story = Story(replace(RULES, max_steps=1)).accepted().called().answered("", A).tool_called(A)
    [end] = story.tool_finished(A).commands
    assert isinstance(end, EndTurn)
    assert end.status == "incomplete"
    assert end.error is not None
    assert end.error.code == "max_steps"


def test_usage_of_all_steps_is_the_turns() -> None:
    story = Story().accepted().called().answered("", A).tool_called(A).tool_finished(A)
    assert story.called(step=2).answered().turn.usage == Usage(20, 4, 2)


# Attempts that are lost


def test_text_that_can_be_continued_is_continued() -> None:
    story = Story().accepted().called().voided("half a", continues=True)
    assert story.commands == (CallModel(1, 2, continued_from=6),)
    assert story.turn.text == "half a"


def test_text_that_cannot_be_continued_is_begun_anew() -> None:
    story = Story().accepted().called().voided("half a", continues=False)
    assert story.commands == (CallModel(1, 2, continued_from=0),)
    assert story.turn.text == ""


def test_what_was_streamed_stays_in_the_window_of_a_cancelled_turn() -> None:
    story = Story().accepted("hi").called().voided("half a", continues=False, reason="cancelled")
    assert story.finished("cancelled").window()[1] == {"role": "assistant", "content": "half a"}


def test_a_failed_call_ends_the_turn_and_leaves_what_was_streamed() -> None:
    story = Story().accepted("hi").called()
    story.tell(ModelFailed, step=1, attempt=1, error=BROKEN, text="half a")
    assert story.commands == (EndTurn("failed", BROKEN),)
    assert story.finished("failed").window()[1] == {"role": "assistant", "content": "half a"}


def test_a_turn_that_ends_among_its_tools_says_what_became_of_each_call() -> None:
    c = ToolCall("c", "once", "{}")
    story = Story().accepted().called().answered("", A, B, c).tool_called(A).tool_called(B)
    results = story.tool_finished(A, "of a").finished("cancelled").window()[2:]
    assert [result["tool_call_id"] for result in results] == ["a", "b", "c"]
    assert results[0]["content"] == "of a"
    assert "unknown" in results[1]["content"]
    assert "before this call was run" in results[2]["content"]


# What models make of a step


def test_models_that_failed_the_step_are_known_until_it_is_answered() -> None:
    story = Story().accepted().called(model="m1").voided().called(2, model="m2").voided("x")
    assert (story.turn.lost, story.turn.failures) == (("m1", "m2"), 2)
    story.called(3, model="m1").answered("", A)
    assert (story.turn.lost, story.turn.failures) == ((), 0)


def test_a_model_that_goes_on_is_not_lost_but_has_failed() -> None:
    story = Story().accepted().called().voided("half", continues=True)
    assert (story.turn.lost, story.turn.failures) == ((), 1)


@pytest.mark.parametrize(
    "how",
    [
        {"reason": OWNER_LOST},
        {"reason": CONTEXT_LENGTH},
        {"reason": "answer_rejected", "escalates": True},
    ],
)
def test_what_is_not_a_models_failure_is_not_counted_as_one(how: dict[str, Any]) -> None:
    story = Story().accepted().called().voided(**how)
    assert (story.turn.lost, story.turn.failures) == ((), 0)
    assert story.commands == (CallModel(1, 2),)


def test_the_model_of_a_call_is_the_one_that_really_answered_or_failed() -> None:
    story = Story().accepted().called(model="m1")
    assert story.turn.model == "m1"
    story.voided(model="hedge")
    assert (story.turn.model, story.turn.lost) == ("hedge", ("hedge",))
    assert story.called(2, model="m1").answered("", A, model="hedge").turn.model == "hedge"


def test_a_step_escalates_once_and_a_turn_remembers_what_overflowed() -> None:
    story = Story().accepted().called(model="m1").voided(reason=CONTEXT_LENGTH)
    story.called(2, model="m2").voided(escalates=True)
    assert (story.turn.overflowed, story.turn.escalated) == ("m1", True)
    story.called(3, model="m3").answered("", A)
    assert (story.turn.overflowed, story.turn.escalated) == ("m1", False)
    story.tool_called(A).tool_finished(A).called(step=2).answered().finished().accepted()
    assert story.turn.overflowed is None


def test_costs_add_up_for_the_step_and_for_the_turn() -> None:
    story = Story().accepted().called().voided(cost=0.25).called(2).voided(cost=0.5)
    assert (story.turn.step_cost, story.turn.cost) == (0.75, 0.75)
    story.called(3).answered("", A, cost=1.0)
    assert (story.turn.step_cost, story.turn.cost) == (0.0, 1.75)
    story.tool_called(A).tool_finished(A).called(step=2).voided(cost=2.0).called(2, step=2)
    assert (story.turn.step_cost, story.turn.cost) == (2.0, 3.75)
    story.tell(ModelFailed, step=2, attempt=2, error=BROKEN, cost=4.0)
    assert story.turn.cost == 7.75


def test_the_time_of_a_step_begins_with_its_first_call_or_its_new_owner() -> None:
    story = Story().accepted()
    story.now = 10.0
    assert story.called().turn.step_at == 10.0
    story.now = 20.0
    assert story.voided().called(2).turn.step_at == 10.0
    story.now = 30.0
    assert story.resumed("model").turn.step_at == 30.0
    story.now = 40.0
    story.voided(reason=OWNER_LOST).called(3)
    assert story.turn.step_at == 30.0
    story.now = 50.0
    story.answered("", A).tool_called(A).tool_finished(A).called(step=2)
    assert story.turn.step_at == 50.0


# Taking over


def test_a_turn_that_had_no_call_yet_is_called() -> None:
    assert resume_of(Story().accepted().resumed()) == (CallModel(1, 1),)


def test_a_voided_call_is_called_again_behind_its_text() -> None:
    story = Story().accepted().called().voided("half", continues=True).resumed()
    assert resume_of(story) == (CallModel(1, 2, 4),)


def test_a_running_call_is_recovered() -> None:
    story = Story().accepted().called().resumed("model")
    assert resume_of(story, tail="half") == (RecoverModel("half"),)


def test_tools_that_had_not_begun_are_called() -> None:
    story = Story().accepted().called().answered("", A, B).resumed("tools")
    assert resume_of(story) == (CallTools(((A, 1), (B, 1))),)


def test_settled_calls_are_left_alone_and_begun_ones_follow_their_tool() -> None:
    c, d = ToolCall("c", "again", "{}"), ToolCall("d", "once", "{}")
    story = Story().accepted().called().answered("", A, B, c, d)
    for call in (A, B, c, d):
        story.tool_called(call)
    story.tool_finished(A).tool_finished(d).resumed("tools")
    assert resume_of(story) == (SettleUnknown(B), CallTools(((c, 2),)))


def test_an_answer_that_is_whole_is_only_ended() -> None:
    story = Story().accepted().called().answered()
    for _ in range(5):
        story.resumed("finishing")
    assert resume_of(story, cancelled=True) == (EndTurn("completed"),)


def test_a_turn_without_progress_is_given_up() -> None:
    story = Story().accepted().resumed().resumed()
    assert resume_of(story) == (CallModel(1, 1),)
    [end] = resume_of(story.resumed())
    assert isinstance(end, EndTurn)
    assert end.status == "failed"
    assert end.error is not None
    assert end.error.code == "recovery_exhausted"


@pytest.mark.parametrize("cancelled", [True, False])
def test_what_was_shown_of_an_answer_is_journaled_before_its_turn_is_given_up(
    cancelled: bool,
) -> None:
    story = Story().accepted().called()
    for _ in range(1 if cancelled else 3):
        story.resumed("model")
    recover, end = resume_of(story, tail="half", cancelled=cancelled)
    assert recover == RecoverModel("half")
    assert isinstance(end, EndTurn)
    assert (end is CANCELLED) == cancelled


@pytest.mark.parametrize("by", ["answer", "tool"])
def test_progress_makes_takeovers_forgotten(by: str) -> None:
    story = Story().accepted().resumed().resumed().called().answered("", A, B)
    if by == "tool":
        story.resumed("tools").resumed("tools").tool_called(A).tool_finished(A)
    assert isinstance(resume_of(story.resumed("tools").resumed("tools"))[-1], CallTools)


def test_a_cancelled_turn_is_not_gone_on_with() -> None:
    story = Story().accepted().called().answered("", A).tool_called(A).resumed("tools")
    assert resume_of(story, cancelled=True) == (CANCELLED,)


# The journal


def test_the_window_holds_the_last_turns() -> None:
    story = Story()
    for number in range(4):
        story.accepted(f"q{number}").called().answered(f"a{number}").finished()
    assert [message["content"] for message in story.window()] == ["q2", "a2", "q3", "a3"]
    assert story.state.turns == 4


def test_a_suffix_from_a_turns_beginning_folds_to_the_same_window() -> None:
    story = Story()
    for number in range(4):
        story.accepted(f"q{number}").called().answered(f"a{number}").finished()
    suffix = fold(SessionState(seq=8, turns=2), story.events[8:], RULES)
    assert suffix == story.state


@pytest.mark.parametrize(
    "wrong",
    [
        lambda s: s.accepted(),
        lambda s: s.called().called(2),
        lambda s: s.called(attempt=2),
        lambda s: s.called(step=2),
        lambda s: s.answered(),
        lambda s: s.tool_called(A),
        lambda s: s.called().answered("", A).called(step=1),
        lambda s: s.called().answered("", A).tool_finished(B),
        lambda s: s.called().answered("", A, B).tool_finished(A).tool_finished(A),
        lambda s: s.called().answered("", A, B).tool_finished(A).tool_called(A),
        lambda s: s.called().answered().called(2),
        lambda s: s.finished().finished(),
    ],
)
def test_events_that_cannot_follow_are_refused(wrong: Any) -> None:
    with pytest.raises(JournalCorruptError):
        wrong(Story().accepted())


@pytest.mark.parametrize("seq", [1, 3])
def test_a_gap_or_a_repetition_is_refused(seq: int) -> None:
    story = Story().accepted()
    event = ModelCalled(seq=seq, turn_id="turn1", at=0.0, step=1, attempt=1, model="m")
    with pytest.raises(JournalCorruptError):
        advance(story.state, event, RULES)


def test_an_event_of_another_turn_is_refused() -> None:
    story = Story().accepted()
    event = ModelCalled(seq=2, turn_id="turn2", at=0.0, step=1, attempt=1, model="m")
    with pytest.raises(JournalCorruptError):
        advance(story.state, event, RULES)
