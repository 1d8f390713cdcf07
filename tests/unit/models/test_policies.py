"""Which model a step is for: each part alone, and what is said about it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agentray.config.settings import CardSettings, RoutingSettings
from agentray.events import StepKind
from agentray.models.policies import (
    BARS,
    Bar,
    Candidate,
    NoModelError,
    Step,
    difficulty,
    order,
    ranks,
    step_kind,
)


def asked(text: str) -> bytes:
    """Return a turn's input as it is in the journal."""
    return json.dumps({"role": "user", "content": text}).encode()


def models(**cards: dict[str, Any]) -> list[Candidate]:
    """Return candidates; ``away_s`` and ``running`` are theirs, everything else their card's."""
    found: list[Candidate] = []
    for position, (name, facts) in enumerate(cards.items()):
        away_s, running = facts.pop("away_s", 0.0), facts.pop("running", 0)
        card = CardSettings.model_validate(facts)
        found.append(Candidate(name, card, position, away_s, running))
    return found


def step(kind: StepKind = "answer", **facts: Any) -> Step:
    return Step(kind=kind, **facts)


# What a step is for


@pytest.mark.parametrize(
    ("text", "facts", "kind"),
    [
        ("Book me a flight", {"tools": True}, "plan"),
        ("What is a monad?", {}, "answer"),
        ("Summarize this thread", {}, "summarise"),
        ("Summarise this thread", {"tools": True}, "summarise"),
        ("Give me the key points.", {}, "summarise"),
        ("TL;DR please", {}, "summarise"),
        ("Three pages of text.\nSummarize them!", {}, "summarise"),
        ("Translate it to French", {}, "format"),
        ("\tConvert it", {"tools": True}, "format"),
        ("the list as JSON", {}, "format"),
        ("put that into a table", {}, "format"),
        ("Who is he?", {"output_schema": True}, "format"),
        ("Summarize it", {"output_schema": True}, "summarise"),
        ("Anything", {"step": 2, "tools": True}, "tool_follow_up"),
        ("Summarize this thread", {"step": 3}, "tool_follow_up"),
        ("a reconversion of unsummarized things", {}, "answer"),
    ],
)
def test_the_kind_of_a_step_is_seen_from_its_input(
    text: str, facts: dict[str, Any], kind: str
) -> None:
    about = {"step": 1, "tools": False, "output_schema": False, **facts}
    assert step_kind(asked(text), **about) == kind


@pytest.mark.parametrize("place", ["begin", "end"])
def test_what_is_wanted_is_found_at_either_end_of_a_long_input(place: str) -> None:
    long = "word " * 20_000
    text = f"Summarize this: {long}" if place == "begin" else f"{long} Summarize this."
    assert step_kind(asked(text), step=1, tools=False, output_schema=False) == "summarise"


def test_the_kinds_differ_in_how_hard_they_are() -> None:
    plain = asked("x")
    kinds: list[StepKind] = ["format", "summarise", "tool_follow_up", "answer", "plan"]
    scores = [difficulty(kind, plain) for kind in kinds]
    assert scores == sorted(scores)
    assert len(set(scores)) == len(scores)


PLAIN = "Tell me about it."


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        (PLAIN * 100, {}),
        (PLAIN + "```x = 1```", {}),
        (PLAIN + " Analyze it.", {}),
        (PLAIN + "\nWhy", {}),
        ("Is it? Or not? Then what? ", {}),
        (PLAIN, {"tools": 9}),
        (PLAIN, {"turns": 11}),
        (PLAIN, {"failed_tools": 1}),
    ],
    ids=["long", "code", "reasoning", "line", "questions", "tools", "turns", "failed tools"],
)
def test_each_feature_makes_a_step_harder(text: str, facts: dict[str, Any]) -> None:
    assert difficulty("answer", asked(text), **facts) > difficulty("answer", asked(PLAIN))


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("the airplanes are planets apart", {}),
        (PLAIN, {"tools": 8}),
        (PLAIN, {"turns": 10}),
    ],
)
def test_what_is_no_feature_does_not(text: str, facts: dict[str, Any]) -> None:
    more = difficulty("answer", asked(text), **facts) - difficulty("answer", asked(PLAIN))
    assert more == pytest.approx(0, abs=0.002)


def test_one_word_said_twice_counts_once_and_more_than_two_words_as_two() -> None:
    one = difficulty("answer", asked("compare"))
    assert difficulty("answer", asked("compare, COMPARE")) == pytest.approx(one, abs=0.001)
    two = difficulty("answer", asked("compare, prove"))
    assert two > one + 0.1
    four = difficulty("answer", asked("compare, prove, design, debug"))
    assert four == pytest.approx(two, abs=0.001)


@pytest.mark.parametrize("kind", ["summarise", "format"])
def test_a_long_input_is_not_hard_to_summarise_or_to_format(kind: StepKind) -> None:
    assert difficulty(kind, asked("word " * 10_000)) == difficulty(kind, asked("word"))
    assert difficulty(kind, asked("word"), failed_tools=1) > difficulty(kind, asked("word"))


def test_difficulty_is_never_more_than_one() -> None:
    text = "prove, design, why? why? why? ```" + "word " * 10_000
    hardest = difficulty("plan", asked(text), tools=20, turns=20, failed_tools=9)
    assert hardest == 1.0


# Bars


@pytest.mark.parametrize(
    ("about", "cards", "says"),
    [
        ({"forced": "b"}, {"a": {}, "b": {}}, "another one is forced"),
        ({}, {"a": {"kind": "embedding"}, "b": {}}, None),
        ({"allowed": ("b",)}, {"a": {}, "b": {}}, "the agent may not use it"),
        ({"images": True}, {"a": {"modalities": ("text",)}, "b": {}}, "it takes no images"),
        ({"tools": True}, {"a": {"tools": False}, "b": {}}, "it cannot ask for tools"),
        ({"output_schema": True}, {"a": {"output_schema": False}, "b": {}}, "it follows no schema"),
        ({"overflowed": "a"}, {"a": {}, "b": {}}, "its context window is too short"),
        (
            {"prompt_tokens": 90, "output_tokens": 20},
            {"a": {"context_window": 100}, "b": {"context_window": 110}},
            "its context window is too short",
        ),
        (
            {"prompt_tokens": 1_000_000, "budget": 1.0},
            {"a": {"price": {"input": 1.1}}, "b": {"price": {"input": 1.0}}},
            "it costs more than the step may",
        ),
        (
            {"prompt_tokens": 0, "output_tokens": 1_000_000, "budget": 1.0},
            {"a": {"price": {"output": 1.1}}, "b": {"price": {"output": 0.5}}},
            "it costs more than the step may",
        ),
    ],
)
def test_a_model_that_does_not_fit_is_ruled_out(
    about: dict[str, Any], cards: dict[str, Any], says: str | None
) -> None:
    found, reason = order(step(**about), models(**cards))
    assert [model.name for model in found] == ["b"]
    assert reason == (f"not a: {says}; the only one left" if says else "the only one")


def test_each_bar_fits_a_step_that_asks_for_nothing() -> None:
    [plain] = models(m={})
    assert all(bar.fits(step(), plain) for bar in BARS)


@pytest.mark.parametrize(
    ("about", "card"),
    [
        ({"prompt_tokens": 100}, {"context_window": 10}),
        ({"output_schema": True}, {"output_schema": False}),
        ({"overflowed": "a"}, {}),
    ],
    ids=["an estimate", "a schema that can be checked", "less can be shown"],
)
def test_a_soft_bar_does_not_rule_the_last_one_out(
    about: dict[str, Any], card: dict[str, Any]
) -> None:
    [found], reason = order(step(**about), models(a=card))
    assert (found.name, reason) == ("a", "the only one")


def test_an_unbounded_answer_is_taken_to_fit_and_to_cost_nothing() -> None:
    about = step(prompt_tokens=99, budget=0.0)
    [found], _ = order(about, models(a={"context_window": 100, "price": {"output": 9.0}}))
    assert found.name == "a"


@pytest.mark.parametrize(
    ("outgrown", "cards", "left"),
    [
        (100, {"a": 100, "b": 100, "c": 200}, ["c"]),
        (100, {"a": 100, "b": None}, ["b"]),
        (0, {"a": None, "b": 50}, ["b"]),
        (100, {"a": 100, "b": 50}, ["a", "b"]),
    ],
    ids=["longer", "unknown", "of an unknown one", "none is longer"],
)
def test_behind_an_overflow_only_longer_windows_are_left_if_there_are_any(
    outgrown: int, cards: dict[str, Any], left: list[str]
) -> None:
    about = step(overflowed="a", outgrown=outgrown)
    candidates = models(**{name: {"context_window": size} for name, size in cards.items()})
    found, _ = order(about, candidates)
    assert [model.name for model in found] == left


@pytest.mark.parametrize(
    ("about", "cards", "said"),
    [
        ({}, {"a": {"kind": "embedding"}}, "a: it answers no chats"),
        ({"forced": "e"}, {"a": {}, "e": {"kind": "embedding"}}, "e: it answers no chats"),
        ({"tools": True}, {"a": {"tools": False}, "b": {"tools": False}}, "a, b: it cannot ask"),
        (
            {"tools": True, "images": True},
            {"a": {"tools": False}, "b": {"modalities": ("text",)}},
            "a: it cannot ask",
        ),
        ({"prompt_tokens": 9, "budget": 0.0}, {"a": {"price": {"input": 1.0}}}, "a: it costs more"),
    ],
)
def test_without_a_model_the_last_that_were_ruled_out_are_named(
    about: dict[str, Any], cards: dict[str, Any], said: str
) -> None:
    with pytest.raises(NoModelError, match=f"^no model for this step: {said}") as caught:
        order(step(**about), models(**cards))
    assert caught.value.code == "no_model"
    assert not caught.value.retryable


# Ranks

SMALL: dict[str, Any] = {"tier": "small"}
LARGE: dict[str, Any] = {"tier": "large"}


@pytest.mark.parametrize(
    ("about", "cards", "says"),
    [
        ({"lost": ("a",)}, {"a": {}, "b": {}}, "the others failed this step"),
        ({"lost": ("a", "a", "b")}, {"a": {}, "b": {}}, "the others failed this step"),
        ({}, {"a": {"away_s": 2.0}, "b": {}}, "the others are unhealthy"),
        ({}, {"a": {"away_s": 2.0}, "b": {"away_s": 1.0}}, "the others are unhealthy"),
        ({"escalated": True}, {"a": {**SMALL}, "b": {**LARGE}}, "escalated"),
        ({"kept": "b"}, {"a": {}, "b": {}}, "kept for the tool loop"),
        (
            {"prompt_tokens": 1_000_000, "session_left": 1.0, "preferred": "a"},
            {"a": {"price": {"input": 1.1}}, "b": {"price": {"input": 1.0}}},
            "the others cost more than its session has left",
        ),
        (
            {"frugal": True, "preferred": "a"},
            {"a": {"price": {"output": 1.0}}, "b": {}},
            "cheapest, its session's budget is nearly spent",
        ),
        ({"preferred": "b"}, {"a": {}, "b": {}}, "the agent prefers it"),
        (
            {"difficulty": 0.49},
            {"a": {**LARGE}, "b": {**SMALL}},
            "small for answer of difficulty 0.49",
        ),
        (
            {"difficulty": 0.5},
            {"a": {**SMALL}, "b": {**LARGE}},
            "large for answer of difficulty 0.50",
        ),
        ({}, {"a": {"max_concurrent": 3, "running": 3}, "b": {}}, "the others are busy"),
        ({}, {"a": {}, "b": {"region": "eu"}}, "in eu"),
        ({}, {"a": {"region": "us"}, "b": {"region": "eu"}}, "in eu"),
        ({"allowed": ("b", "a")}, {"a": {}, "b": {}}, "the agent's order"),
        ({}, {"a": {"price": {"output": 1.0}}, "b": {}}, "cheapest"),
        ({}, {"a": {"price": {"gpu_second": 0.1}}, "b": {"price": {"output": 9.0}}}, "cheapest"),
        (
            {},
            {"a": {"context_window": 200_000}, "b": {"context_window": 8_000}},
            "a longer window is not needed",
        ),
    ],
)
def test_each_rank_says_why_it_preferred_one(
    about: dict[str, Any], cards: dict[str, Any], says: str
) -> None:
    found, reason = order(step(**about), models(**cards), ranks=ranks(0.5, "eu"))
    assert ([model.name for model in found], reason) == (["b", "a"], says)


def test_models_that_do_not_differ_keep_the_order_of_the_configuration() -> None:
    found, reason = order(step(), models(a={}, b={}, c={}))
    assert [model.name for model in found] == ["a", "b", "c"]
    assert reason == "first in the configuration"


def test_without_a_region_none_is_preferred() -> None:
    _, reason = order(step(), models(a={}, b={"region": "eu"}), ranks=ranks(0.5, None))
    assert reason == "first in the configuration"


@pytest.mark.parametrize(
    ("weaker", "stronger"),
    [
        ({"preferred": "a"}, {"escalated": True}),
        ({"kept": "a"}, {"escalated": True}),
        ({"preferred": "a"}, {"kept": "b"}),
        ({"kept": "a"}, {"lost": ("a",)}),
        ({"escalated": True}, {"lost": ("b",)}),
        ({"prompt_tokens": 9, "session_left": 0.0, "frugal": True}, {"lost": ("a",)}),
        ({"prompt_tokens": 9, "session_left": 0.0, "frugal": True}, {"escalated": True}),
        ({"prompt_tokens": 9, "session_left": 0.0, "frugal": True}, {"kept": "b"}),
    ],
)
def test_what_was_learnt_of_a_model_is_more_than_what_was_wanted(
    weaker: dict[str, Any], stronger: dict[str, Any]
) -> None:
    candidates = models(a={**SMALL}, b={**LARGE, "price": {"input": 1.0}})
    first = order(step(**weaker), candidates)[0][0].name
    both = order(step(**weaker, **stronger), candidates)[0][0].name
    assert both != first


def test_behind_an_overflow_the_same_model_is_asked_again_if_none_is_longer() -> None:
    candidates = models(a={"context_window": 100, **LARGE}, b={"context_window": 50, **SMALL})
    found, reason = order(step(overflowed="a", outgrown=100, preferred="b"), candidates)
    assert (found[0].name, reason) == ("a", "no other one has a longer window")


def test_the_reason_names_every_rank_that_was_needed() -> None:
    found, reason = order(
        step(difficulty=0.1),
        models(a={**SMALL, "price": {"output": 3.0}}, b={**SMALL}, c={**LARGE}),
    )
    assert [model.name for model in found][:2] == ["b", "a"]
    assert reason == "small for answer of difficulty 0.10; cheapest"


def test_the_reason_says_first_what_was_ruled_out() -> None:
    about = step(tools=True, preferred="c")
    _, reason = order(about, models(a={}, b={"tools": False}, c={}))
    assert reason == "not b: it cannot ask for tools; the agent prefers it"


def test_bars_of_ones_own_can_be_given() -> None:
    never = Bar("never", lambda step, model: False)
    with pytest.raises(NoModelError, match="m: never"):
        order(step(), models(m={}), bars=(never,))


def test_the_parts_agree_with_the_default_threshold() -> None:
    below = RoutingSettings().difficulty - 0.01
    found, _ = order(step(difficulty=below), models(a={**LARGE}, b={**SMALL}))
    assert found[0].name == "b"
