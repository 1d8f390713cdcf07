"""What is decided about a step's model calls."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from msgspec.structs import replace

from agentray.config.settings import AgentSettings
from agentray.events import ModelFailed, ModelVoided, TurnError
from agentray.models.policies import Step
from agentray.sessions.state import CONTEXT_LENGTH, OWNER_LOST, Rules
from agentray.sessions.steps import (
    after_lost_call,
    output_schema,
    shown_window,
    step_of,
    time_left_s,
    tokens_left,
)
from tests.unit.sessions.story import BROKEN, RULES, A, B, Story

TOO_LONG = TurnError(CONTEXT_LENGTH, "too long")
IMAGE = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]


def step_for(
    story: Story,
    *,
    tools: int = 0,
    preferred: str | None = None,
    minds_images: bool = True,
    compares: bool = True,
    rules: Rules = RULES,
    **agent: Any,
) -> Step:
    return step_of(
        story.state,
        story.turn,
        AgentSettings(**agent),
        preferred=preferred,
        tools=tools,
        minds_images=minds_images,
        compares=compares,
        rules=rules,
    )


# What the router is told


def test_a_first_step_is_free() -> None:
    step = step_for(Story().accepted("hi"), instructions="i" * 400)
    assert step == Step(kind="answer", difficulty=step.difficulty, prompt_tokens=step.prompt_tokens)
    assert 100 < step.prompt_tokens < 120
    assert 0 < step.difficulty < 0.5


def test_the_kind_and_the_difficulty_are_the_inputs() -> None:
    assert step_for(Story().accepted("Summarize it")).kind == "summarise"
    assert step_for(Story().accepted(), tools=3).kind == "plan"
    hard = step_for(Story().accepted("Prove it, step by step, and compare."))
    assert hard.difficulty > step_for(Story().accepted()).difficulty + 0.2


def test_nobody_asks_how_difficult_a_step_is_for_the_only_model() -> None:
    assert step_for(Story().accepted("Prove it."), compares=False).difficulty == 0.0


def test_tools_are_told_if_there_are_any() -> None:
    assert not step_for(Story().accepted(), tools=0).tools
    assert step_for(Story().accepted(), tools=1).tools


def test_what_the_caller_said_comes_before_the_agent() -> None:
    forced = Story().accepted(model="m", max_output_tokens=7, output_schema={})
    step = step_for(forced, models=("a", "b"), max_output_tokens=9)
    assert (step.forced, step.allowed, step.output_tokens) == ("m", (), 7)
    assert step.output_schema
    assert step.kind == "format"


def test_what_the_agent_says_holds_for_who_says_nothing() -> None:
    step = step_for(
        Story().accepted(),
        preferred="b",
        models=("a", "b"),
        max_output_tokens=9,
        output_schema={"type": "object"},
    )
    assert (step.forced, step.preferred, step.allowed) == (None, "b", ("a", "b"))
    assert (step.output_tokens, step.output_schema) == (9, True)


@pytest.mark.parametrize(
    ("asked", "agents", "schema"),
    [
        (None, None, None),
        (None, {"a": 1}, {"a": 1}),
        ({}, {"a": 1}, {}),
        ({"b": 2}, None, {"b": 2}),
    ],
)
def test_a_callers_schema_comes_before_the_agents(asked: Any, agents: Any, schema: Any) -> None:
    story = Story().accepted(output_schema=asked)
    assert output_schema(story.turn, AgentSettings(output_schema=agents)) == schema


def test_an_image_counts_as_a_thousand_tokens_however_large_it_is() -> None:
    url = "data:image/png;base64," + "A" * 1_000_000
    large: list[Any] = [{"type": "image_url", "image_url": {"url": url}}]
    assert 1_000 <= step_for(Story().accepted(large)).prompt_tokens < 1_100


def test_images_are_found_in_what_is_asked_and_in_the_past() -> None:
    assert not step_for(Story().accepted("hi")).images
    asked = Story().accepted(IMAGE)
    assert step_for(asked).images
    assert not step_for(asked, minds_images=False).images
    past = asked.called().answered().finished().accepted("and now?")
    assert step_for(past).images


def test_the_prompt_grows_with_the_past_the_results_and_the_text_so_far() -> None:
    story = Story().accepted()
    sizes = [step_for(story).prompt_tokens]
    story.called().answered("", A).tool_called(A).tool_finished(A, "r" * 400)
    sizes.append(step_for(story).prompt_tokens)
    story.called(step=2).voided("x" * 400, continues=True)
    sizes.append(step_for(story).prompt_tokens)
    story.called(2, step=2).answered("a" * 400).finished().accepted()
    sizes.append(step_for(story).prompt_tokens)
    grown = [after - before for before, after in pairwise(sizes)]
    assert all(more >= 100 for more in grown[:2])
    assert sizes[3] - sizes[0] >= 200


def test_the_third_step_keeps_the_model_of_the_second() -> None:
    story = Story(replace(RULES, max_steps=9)).accepted()
    assert step_for(story).kept is None
    story.called(model="m1").answered("", A).tool_called(A).tool_finished(A)
    second = step_for(story)
    assert (second.kind, second.kept) == ("tool_follow_up", None)
    story.called(step=2, model="m2").answered("", B).tool_called(B).tool_finished(B)
    assert step_for(story).kept == "m2"
    # Whoever failed is not kept.
    assert step_for(story.called(step=3, model="m2").voided()).kept is None


def test_the_model_that_really_answered_is_the_one_that_is_kept() -> None:
    story = Story(replace(RULES, max_steps=9)).accepted().called().answered("", A)
    story.tool_called(A).tool_finished(A).called(step=2, model="m").answered("", B, model="hedge")
    assert step_for(story.tool_called(B).tool_finished(B)).kept == "hedge"


def test_text_that_is_continued_is_its_models_own() -> None:
    story = Story().accepted().called(model="m1")
    assert step_for(story.voided("half", continues=True)).goes_on == "m1"
    story.called(2, continued_from=4, model="m1").voided("half", continues=False)
    assert step_for(story).goes_on is None


def test_what_failed_is_told_with_each_attempt() -> None:
    story = Story().accepted().called(model="m1").voided()
    story.called(2, model="m2").voided(reason=CONTEXT_LENGTH)
    story.called(3, model="m3").voided(reason="answer_rejected", escalates=True)
    step = step_for(story)
    assert (step.lost, step.overflowed, step.escalated) == (("m1",), "m2", True)


def test_tools_that_failed_make_the_next_step_harder() -> None:
    def after(status: str) -> float:
        story = Story().accepted().called().answered("", A).tool_called(A)
        return step_for(story.tool_finished(A, status=status)).difficulty

    assert after("error") > after("ok")


def test_what_a_step_may_still_cost_is_its_budget() -> None:
    rules = replace(RULES, step_cost_cap=1.0)
    assert step_for(Story().accepted()).budget is None
    story = Story(rules).accepted()
    assert step_for(story, rules=rules).budget == 1.0
    story.called().voided(cost=0.75)
    assert step_for(story, rules=rules).budget == 0.25
    story.called(2).voided(cost=0.75)
    assert step_for(story, rules=rules).budget == 0.0


@pytest.mark.parametrize(
    ("spent", "left", "frugal"),
    [(0.0, 10.0, False), (7.99, 2.01, False), (8.0, 2.0, True), (11.0, 0.0, True)],
)
def test_a_session_turns_frugal_at_four_fifths_of_its_budget(
    spent: float, left: float, frugal: bool
) -> None:
    rules = replace(RULES, session_budget=10.0)
    story = Story(rules).accepted().called().answered(cost=spent / 2).finished(cost=spent / 2)
    # What the running turn has cost counts as well.
    story.accepted().called().voided(cost=spent / 2)
    step = step_for(story, rules=rules)
    assert (step.session_left, step.frugal) == (pytest.approx(left), frugal)
    plain = step_for(story)
    assert (plain.session_left, plain.frugal) == (None, False)


def test_a_model_that_overflowed_is_shown_the_younger_half() -> None:
    story = Story().accepted().called(model="m1").voided(reason=CONTEXT_LENGTH)
    for window, half in (
        ([], []),
        ([b"1"], []),
        ([b"1", b"2"], [b"2"]),
        ([b"1", b"2", b"3"], [b"3"]),
        ([b"1", b"2", b"3", b"4"], [b"3", b"4"]),
    ):
        assert list(shown_window(window, story.turn, "m1")) == half
        assert list(shown_window(window, story.turn, "m2")) == window


def test_the_whole_past_counts_for_the_choice_of_a_longer_window() -> None:
    story = Story().accepted("x" * 4_000).called().answered().finished().accepted()
    before = step_for(story).prompt_tokens
    story.called().voided(reason=CONTEXT_LENGTH)
    assert step_for(story).prompt_tokens == before > 1_000


# Time and tokens


def test_the_time_of_a_step_runs_from_its_first_call() -> None:
    rules = replace(RULES, step_timeout_s=10.0)
    story = Story(rules)
    story.now = 100.0
    story.accepted()
    story.now = 103.0
    story.called()
    assert time_left_s(story.turn, rules, 107.0) == 6.0
    story.now = 108.0
    story.voided().called(2)
    assert time_left_s(story.turn, rules, 109.0) == 4.0
    assert 0 < time_left_s(story.turn, rules, 999.0) < 0.1


def test_each_step_has_its_own_time_and_no_time_runs_without_an_owner() -> None:
    rules = replace(RULES, step_timeout_s=10.0)
    story = Story(rules).accepted().called()
    story.now = 500.0
    story.resumed("model").voided(reason=OWNER_LOST)
    assert time_left_s(story.turn, rules, 501.0) == 9.0
    story.now = 502.0
    story.called(2).answered("", A).tool_called(A)
    story.now = 600.0
    story.tool_finished(A).called(step=2)
    assert time_left_s(story.turn, rules, 601.0) == 9.0


@pytest.mark.parametrize(
    ("limit", "text", "left"),
    [(None, "x" * 40, None), (50, "", 50), (50, "x" * 40, 40), (5, "x" * 400, 1)],
)
def test_a_text_that_is_continued_counts_against_its_limit(
    limit: int | None, text: str, left: int | None
) -> None:
    assert tokens_left(limit, text) == left


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


@pytest.mark.parametrize(
    ("limit", "text", "left"),
    [(None, "said", None), (9, "", 9), (9, "x" * 16, 5), (9, "é" * 4, 7), (9, "x" * 400, 1)],
)
def test_a_limit_of_tokens_leaves_what_was_not_said(
    limit: int | None, text: str, left: int | None
) -> None:
    assert tokens_left(limit, text) == left


def test_nothing_streamed_is_nothing_to_continue() -> None:
    story = Story().accepted().called()
    assert not lose(story, text="", continues=True).continues
    assert lose(story, text="x", continues=True).continues


def test_a_step_makes_no_attempt_behind_its_time() -> None:
    rules = replace(RULES, step_timeout_s=10.0)
    story = Story(rules).accepted().called()
    assert isinstance(lose(story, now=9.9), ModelVoided)
    event = lose(story, now=10.0, text="half")
    assert isinstance(event, ModelFailed)
    assert event.error == TurnError("step_timeout", "the step's 10 s are over; last: it broke")
    assert event.text == "half"


def test_a_step_makes_no_attempt_when_it_has_cost_what_it_may() -> None:
    rules = replace(RULES, step_cost_cap=1.0, model_attempts=9)
    story = Story(rules).accepted().called()
    event = lose(story, cost=0.5)
    assert isinstance(event, ModelVoided)
    assert event.cost == 0.5
    story.voided(cost=0.5).called(2)
    event = lose(story, cost=0.5)
    assert isinstance(event, ModelFailed)
    assert (event.error.code, event.cost) == ("step_cost_cap", 0.5)
    assert "1 dollars are spent; last: it broke" in event.error.message


def test_what_would_not_be_tried_again_anyway_keeps_its_own_error() -> None:
    rules = replace(RULES, step_timeout_s=1.0, step_cost_cap=1.0)
    event = lose(Story(rules).accepted().called(), may_pass=False, now=9.0, cost=9.0)
    assert event.error == BROKEN


def test_what_another_step_cost_is_not_this_ones() -> None:
    rules = replace(RULES, step_cost_cap=1.0)
    story = Story(rules).accepted().called().voided(cost=0.9).called(2).answered("", A, cost=0.9)
    story.tool_called(A).tool_finished(A).called(step=2)
    assert isinstance(lose(story, cost=0.2), ModelVoided)


def test_a_context_that_is_too_long_is_tried_once_more_whatever_else_failed() -> None:
    story = Story().accepted().called().voided().called(2).voided().called(3)
    event = lose(story, error=TOO_LONG, may_pass=False, text="half", continues=True)
    assert isinstance(event, ModelVoided)
    assert (event.reason, event.continues) == (CONTEXT_LENGTH, False)
    story.voided(reason=CONTEXT_LENGTH).called(4)
    assert isinstance(lose(story, error=TOO_LONG), ModelFailed)


def test_a_context_that_is_too_long_costs_no_attempt_of_the_models() -> None:
    story = Story().accepted().called().voided(reason=CONTEXT_LENGTH).called(2).voided().called(3)
    assert isinstance(lose(story), ModelVoided)
