"""Picking a model with what is known of all of them, and taking down how its calls end."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from agentray.clock import ManualClock
from agentray.config.settings import ModelsSettings
from agentray.errors import (
    ModelContextLengthError,
    ModelError,
    ModelNotFoundError,
    ModelRateLimitedError,
    ModelUnavailableError,
)
from agentray.events import Route, StepKind, Usage
from agentray.models.base import ModelHealth
from agentray.models.catalog import Catalog
from agentray.models.policies import NoModelError, Step
from agentray.models.router import Attempt, Router, may_succeed_elsewhere
from agentray.telemetry.metrics import Metrics

MODELS: dict[str, Any] = {
    "small": {"tier": "small", "context_window": 1_000, "price": {"input": 1.0, "output": 4.0}},
    "large": {"tier": "large", "context_window": 9_000, "price": {"input": 10.0, "output": 40.0}},
}
BROKEN = ModelUnavailableError("it broke")
USAGE = Usage(input_tokens=1_000_000, output_tokens=100_000, cached_tokens=0)


class World:
    """A router over ``cards``, its clock and its metrics."""

    def __init__(
        self,
        cards: dict[str, Any] | None = None,
        *,
        served: tuple[str, ...] = (),
        seed: int = 1,
        **settings: Any,
    ) -> None:
        cards = MODELS if cards is None else cards
        settings.setdefault("breaker", {"min_calls": 2, "open_s": 5.0})
        configured = ModelsSettings.model_validate(
            {
                "endpoints": {
                    name: {"url": "http://h/v1", "card": card}
                    for name, card in cards.items()
                    if name not in served
                },
                "serve": {name: {"source": "s", "card": cards[name]} for name in served},
                **settings,
            }
        )
        self.clock = ManualClock()
        self.metrics = Metrics()
        self.health: dict[str, ModelHealth] = {}
        self.router = Router(
            Catalog(configured, "http://served"),
            configured,
            clock=self.clock,
            metrics=self.metrics,
            served_health=lambda name: self.health.get(name, ModelHealth(healthy=True)),
            rng=random.Random(seed),
        )

    def choose(self, kind: StepKind = "answer", **about: Any) -> str:
        return self.router.choose(Step(kind=kind, **about)).model

    def route(self, kind: StepKind = "answer", **about: Any) -> Route:
        return self.router.choose(Step(kind=kind, **about)).route

    def open(self, model: str) -> None:
        """Let calls of a model fail until its breaker is open."""
        for _ in range(2):
            self.router.begin(model, None).lost(BROKEN)
        assert self.router.wait_s(model) > 0

    def counted(self, metric: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(metric, labels) or 0.0

    def calls(self) -> dict[tuple[str, str, str, str, str], float]:
        (family,) = self.metrics.model_calls.collect()
        names = ("model", "tier", "kind", "outcome", "held_out")
        return {
            tuple(sample.labels[name] for name in names): sample.value  # type: ignore[misc]
            for sample in family.samples
            if sample.name.endswith("_total") and sample.value
        }


NO_HOLDOUT: dict[str, Any] = {"routing": {"holdout": 0.0}}


# Choosing


def test_the_choice_is_told_with_its_candidates_and_its_reason() -> None:
    choice = World(**NO_HOLDOUT).router.choose(Step(kind="summarise", difficulty=0.1))
    assert choice.model == "small"
    assert choice.route == Route(
        "summarise", ["small", "large"], "small for summarise of difficulty 0.10"
    )


def test_a_difficult_step_goes_to_the_large_tier() -> None:
    world = World(routing={"difficulty": 0.7, "holdout": 0.0})
    assert world.choose(difficulty=0.69) == "small"
    assert world.choose(difficulty=0.7) == "large"


def test_a_forced_model_is_the_only_one() -> None:
    world = World(routing={"holdout": 1.0, "hedge_after_s": 1.0})
    route = world.route(forced="small", difficulty=0.9)
    assert (route.candidates, route.held_out, route.hedge) == (["small"], False, None)


def test_a_forced_model_that_does_not_exist_is_said_so() -> None:
    with pytest.raises(ModelNotFoundError, match="'none'; the models are small, large"):
        World().choose(forced="none")


def test_a_model_that_is_no_longer_there_is_neither_preferred_nor_kept() -> None:
    about = {"kept": "gone", "preferred": "gone", "overflowed": "gone", "lost": ("gone",)}
    assert World(**NO_HOLDOUT).choose(**about) == "small"


def test_the_agents_preference_comes_before_the_tier() -> None:
    world = World(**NO_HOLDOUT)
    assert world.choose(preferred="large") == "large"
    assert world.choose(preferred="small", difficulty=0.9) == "small"


def test_only_what_the_agent_may_use_comes_into_question() -> None:
    assert World().route(allowed=("large",)).candidates == ["large"]
    with pytest.raises(NoModelError, match="the agent may not use it"):
        World().choose(allowed=("gone",))


def test_a_tool_loop_keeps_its_model_while_that_is_there() -> None:
    world = World(**NO_HOLDOUT)
    assert world.choose("tool_follow_up", kept="large", difficulty=0.1) == "large"
    world.open("large")
    assert world.choose("tool_follow_up", kept="large", difficulty=0.1) == "small"


def test_an_escalated_step_leaves_the_model_that_was_preferred() -> None:
    assert World().choose(preferred="small", escalated=True) == "large"


@pytest.mark.parametrize(
    "about",
    [
        {"preferred": "large"},
        {"difficulty": 0.9},
        {"lost": ("small",)},
        {"tools": True},
        {"budget": 1e-9, "prompt_tokens": 1},
    ],
)
def test_a_text_is_gone_on_with_by_its_own_model_whatever_else_is_better(
    about: dict[str, Any],
) -> None:
    cards = {**MODELS, "small": {**MODELS["small"], "tools": False}}
    cards["free"] = {"tier": "large"}
    route = World(cards, **NO_HOLDOUT).route(goes_on="small", **about)
    assert (route.candidates[0], route.reason) == ("small", "goes on with its own text")
    assert route.candidates.count("small") == 1
    assert len(route.candidates) > 1


def test_a_text_is_not_gone_on_with_by_the_only_model_that_is_left() -> None:
    cards = {"a": {"tools": False}, "b": {}}
    assert World(cards).choose(goes_on="a", tools=True) == "a"


def test_a_model_that_failed_the_step_comes_last() -> None:
    world = World(**NO_HOLDOUT)
    assert world.route(lost=("small",)).candidates == ["large", "small"]
    assert world.choose(lost=("small", "large", "large")) == "small"


def test_an_overflow_goes_to_a_longer_window_whatever_it_costs() -> None:
    cards = {
        **MODELS,
        "cheap": {"tier": "small", "context_window": 1_000},
        "shorter": {"tier": "small", "context_window": 500},
    }
    route = World(cards).route(overflowed="small", prompt_tokens=10)
    assert route.candidates == ["large"]
    assert "its context window is too short" in route.reason


def test_an_overflow_of_the_longest_window_stays_there() -> None:
    world = World()
    assert world.choose(overflowed="large", preferred="small", prompt_tokens=10) == "large"


def test_a_served_model_that_is_not_well_is_avoided_while_another_is() -> None:
    world = World(served=("small",), **NO_HOLDOUT)
    assert world.choose() == "small"
    world.health["small"] = ModelHealth(healthy=False, reason="it does not load")
    route = world.route()
    assert (route.candidates[0], route.reason) == ("large", "the others are unhealthy")
    world.open("large")
    assert world.choose() == "large", "what is back sooner is tried"
    assert world.choose(forced="small") == "small"


def test_an_open_breaker_makes_its_model_the_last_until_it_may_be_probed() -> None:
    world = World(**NO_HOLDOUT)
    world.open("small")
    assert world.choose() == "large"
    world.clock.advance(5)
    assert world.choose() == "small"
    probe = world.router.begin("small", None)
    assert world.choose() == "large", "one probe at a time"
    probe.answered(Usage())
    assert world.choose() == "small"


def test_a_model_that_is_busy_is_passed_over() -> None:
    cards = {name: {"tier": "small", "max_concurrent": 1} for name in ("a", "b")}
    world = World(cards)
    first = world.router.begin("a", None)
    assert world.choose() == "b"
    first.answered(Usage())
    assert world.choose() == "a"


# What is held out


def test_a_share_of_the_small_tiers_calls_is_held_out_to_the_large_one() -> None:
    world = World()
    chosen = Counter(
        (choice.model, choice.route.held_out)
        for choice in (world.router.choose(Step(kind="answer")) for _ in range(10_000))
    )
    assert set(chosen) == {("small", False), ("large", True)}
    assert 150 <= chosen["large", True] <= 250


def test_what_is_held_out_says_what_it_would_have_been() -> None:
    route = World(routing={"holdout": 1.0}).route("format", difficulty=0.05)
    assert route.held_out
    assert route.reason == (
        "held out from the small tier, which had: small for format of difficulty 0.05"
    )


@pytest.mark.parametrize(
    "about",
    [
        {"difficulty": 0.9},
        {"forced": "small"},
        {"preferred": "small"},
        {"kept": "small"},
        {"goes_on": "small"},
        {"lost": ("large",)},
        {"overflowed": "large", "difficulty": 0.1},
        {"frugal": True},
        {"allowed": ("small",)},
    ],
)
def test_only_free_choices_of_the_small_tier_are_held_out(about: dict[str, Any]) -> None:
    assert not World(routing={"holdout": 1.0}).route(**about).held_out


def test_what_overflowed_is_not_held_out_either() -> None:
    cards = {**MODELS, "middle": {"tier": "small", "context_window": 5_000}}
    route = World(cards, routing={"holdout": 1.0}).route(overflowed="small")
    assert (route.candidates[0], route.held_out) == ("middle", False)


def test_nothing_is_held_out_to_a_model_that_is_away_or_busy() -> None:
    world = World(routing={"holdout": 1.0})
    world.open("large")
    assert world.choose() == "small"
    busy = {**MODELS, "large": {**MODELS["large"], "max_concurrent": 1}}
    world = World(busy, routing={"holdout": 1.0})
    world.router.begin("large", None)
    assert world.choose() == "small"


# Hedging and other ways out


def test_the_best_of_the_others_hedges_if_that_is_wanted() -> None:
    cards = {"a": {"tier": "small"}, "b": {"tier": "small"}, "c": {"tier": "large"}}
    world = World(cards, routing={"hedge_after_s": 0.5, "holdout": 0.0})
    assert world.route().hedge == "b"
    world.open("b")
    assert world.route().hedge == "c"
    world.open("c")
    assert world.route().hedge is None
    assert World(cards, **NO_HOLDOUT).route().hedge is None


def test_a_frugal_session_pays_for_no_second_call() -> None:
    world = World(routing={"hedge_after_s": 0.5, "holdout": 0.0})
    assert world.route().hedge is not None
    assert world.route(frugal=True).hedge is None


def test_there_is_another_one_while_a_candidate_may_be_called_that_did_not_fail() -> None:
    world = World()
    route = world.route()
    assert world.router.has_other(route, "small")
    assert not world.router.has_other(route, "small", ("large",))
    world.open("large")
    assert not world.router.has_other(route, "small")
    assert world.router.has_other(route, "large")
    assert not world.router.has_other(None, "small")


def test_a_step_can_escalate_from_the_small_tier_to_one_that_is_there() -> None:
    world = World()
    route = world.route()
    assert world.router.can_escalate(route, "small")
    assert not world.router.can_escalate(route, "large")
    assert not world.router.can_escalate(None, "small")
    assert not world.router.can_escalate(world.route(forced="small"), "small")
    world.open("large")
    assert not world.router.can_escalate(route, "small")
    off = World(routing={"escalate": False})
    assert not off.router.can_escalate(off.route(), "small")


def test_a_choice_without_alternative_is_the_same_object_each_time() -> None:
    world = World({"m": {}})
    first = world.router.choose(Step(kind="plan"))
    assert world.router.choose(Step(kind="plan", prompt_tokens=7)) is first
    assert world.router.choose(Step(kind="answer")).route.kind == "answer"


@pytest.mark.parametrize(
    ("about", "card"),
    [
        ({"images": True}, {"modalities": ("text",)}),
        ({"tools": True}, {"tools": False}),
        ({"allowed": ("other",)}, {}),
        ({"forced": "other"}, {}),
        ({"budget": 0.0, "prompt_tokens": 9}, {"price": {"input": 1.0}}),
    ],
    ids=["images", "tools", "allowed", "forced", "budget"],
)
def test_a_choice_without_alternative_is_not_given_to_a_step_that_the_model_is_not_for(
    about: dict[str, Any], card: dict[str, Any]
) -> None:
    world = World({"m": card})
    assert world.choose() == "m"
    with pytest.raises((NoModelError, ModelNotFoundError)):
        world.choose(**about)


# Waiting


@pytest.mark.parametrize("failures", [0, 1, 2, 5])
def test_the_wait_doubles_and_is_jittered(failures: int) -> None:
    waits = [World(seed=seed).router.backoff_s(failures, BROKEN) for seed in range(50)]
    usual = 0.1 * 2**failures
    assert min(waits) >= 0.5 * usual
    assert max(waits) <= 1.5 * usual
    assert len(set(waits)) == 50
    assert max(waits) > 1.2 * usual > 0.8 * usual > min(waits)


def test_a_wait_that_was_asked_for_is_kept_and_nobody_returns_at_once_with_the_others() -> None:
    asked = ModelRateLimitedError("slow down", retry_after_s=4.0)
    waits = [World(seed=seed).router.backoff_s(0, asked) for seed in range(50)]
    assert min(waits) >= 4.0
    assert max(waits) <= 4.4
    assert len(set(waits)) == 50


def test_only_who_is_told_to_waits_longer_than_half_a_minute() -> None:
    router = World().router
    assert router.backoff_s(20, BROKEN) == 30.0
    assert router.backoff_s(0, ModelRateLimitedError("", retry_after_s=200.0)) >= 200.0


def test_a_limit_ends_after_ten_minutes_whatever_was_said() -> None:
    world = World()
    world.router.begin("small", None).lost(ModelRateLimitedError("", retry_after_s=1e9))
    assert world.router.wait_s("small") == 600.0


def test_a_probe_that_speaks_closes_its_breaker_however_long_it_goes_on() -> None:
    world = World()
    world.open("small")
    world.clock.advance(world.router.wait_s("small"))
    probe = world.router.begin("small", None)
    assert world.router.wait_s("small") > 0
    probe.spoke()
    assert world.router.wait_s("small") == 0
    assert world.router.health()["small"].healthy
    probe.lost(BROKEN)
    assert world.router.wait_s("small") == 0


def test_who_is_sent_away_is_told_why_and_until_when() -> None:
    world = World()
    world.open("small")
    error = world.router.away("small", world.router.wait_s("small"))
    assert error.message == "model 'small' is left alone for 5.0 s: it broke"
    assert error.fields == {"model": "small", "retry_after_s": 5.0, "unsent": True}
    assert world.router.away("large", 1.0).message.endswith("it takes no more calls for now")


def test_a_model_that_does_not_exist_cannot_be_called() -> None:
    router = World().router
    assert router.wait_s("gone") == 0
    with pytest.raises(ModelNotFoundError, match="the models are small, large"):
        router.begin("gone", None)


# What attempts tell


def test_an_answer_costs_what_its_tokens_do() -> None:
    world = World()
    usage = Usage(1_000_000, 100_000, 400_000)
    assert world.router.begin("small", None).answered(usage) == pytest.approx(1.4)
    tokens = "agentray_model_tokens_total"
    assert world.counted(tokens, model="small", direction="input") == 600_000
    assert world.counted(tokens, model="small", direction="cached") == 400_000
    assert world.counted(tokens, model="small", direction="output") == 100_000
    cost = "agentray_model_cost_dollars_total"
    assert world.counted(cost, model="small", tier="small") == pytest.approx(1.4)
    assert world.counted("agentray_always_large_cost_dollars_total") == pytest.approx(14.0)


def test_embeddings_are_no_answers_of_a_tier() -> None:
    embedder = {"kind": "embedding", "price": {"input": 1.0}}
    world = World({**MODELS, "e": embedder})
    assert world.router.begin("e", None).answered(USAGE) == pytest.approx(1.0)
    assert world.calls() == {("e", "none", "embedding", "answered", "no"): 1}
    cost = "agentray_model_cost_dollars_total"
    assert world.counted(cost, model="e", tier="none") == pytest.approx(1.0)
    assert world.counted("agentray_always_large_cost_dollars_total") == 0


def test_time_on_an_own_accelerator_costs_from_beginning_to_end() -> None:
    world = World({"own": {"price": {"gpu_second": 0.5}}})
    attempt = world.router.begin("own", None)
    world.clock.advance(4)
    assert attempt.lost(BROKEN) == pytest.approx(2.0)


@pytest.mark.parametrize("first", ["answered", "rejected", "lost", "cancelled"])
def test_a_call_is_settled_once_whatever_is_called_behind_it(first: str) -> None:
    world = World()
    attempt = world.router.begin("small", Route("plan", ["small"], "r", held_out=True))
    assert end(attempt, first) > 0
    for again in ("answered", "rejected", "lost", "cancelled"):
        assert end(attempt, again) == 0
    assert world.calls() == {("small", "small", "plan", first, "yes"): 1}
    tokens = "agentray_model_tokens_total"
    assert world.counted(tokens, model="small", direction="output") == 100_000


def end(attempt: Attempt, how: str) -> float:
    if how == "lost":
        return attempt.lost(BROKEN, USAGE)
    if how == "cancelled":
        return attempt.cancelled(USAGE)
    return attempt.answered(USAGE, rejected=how == "rejected")


def test_calls_are_counted_by_kind_and_without_a_route_as_answers() -> None:
    world = World()
    world.router.begin("small", None).answered(Usage())
    world.router.begin("small", world.route("format", forced="small")).cancelled()
    assert world.calls() == {
        ("small", "small", "answer", "answered", "no"): 1,
        ("small", "small", "format", "cancelled", "no"): 1,
    }


def test_only_answers_are_compared_with_the_large_tier() -> None:
    world = World()
    for how in ("rejected", "lost", "cancelled"):
        end(world.router.begin("small", None), how)
    assert world.counted("agentray_always_large_cost_dollars_total") == 0
    assert world.counted("agentray_model_cost_dollars_total", model="small", tier="small") > 0


@pytest.mark.parametrize(
    ("error", "opens"),
    [
        (BROKEN, True),
        (ModelUnavailableError("nothing", empty=True), True),
        (ModelError("no credit", status=402), True),
        (ModelError("no such key", status=401), True),
        (ModelError("bad request", status=400), False),
        (ModelContextLengthError("too long", status=400), False),
        (ModelRateLimitedError("slow down"), False),
    ],
)
def test_what_is_the_models_fault_opens_its_breaker(error: ModelError, opens: bool) -> None:
    world = World()
    for _ in range(4):
        world.router.begin("small", None).lost(error)
    health = world.router.health()["small"]
    assert health.healthy is not opens
    status = error.fields.get("status")
    # What the endpoint said may repeat what it was asked.
    told = error.message if status is None else f"it answered {status}"
    assert health.reason == (told if opens else None)
    assert world.counted("agentray_breaker_open", model="small") == opens


@pytest.mark.parametrize("how", ["answered", "rejected", "cancelled"])
def test_what_is_not_its_fault_never_opens_it(how: str) -> None:
    world = World()
    for _ in range(10):
        end(world.router.begin("small", None), how)
    assert world.router.health()["small"].healthy


def test_a_call_that_its_caller_had_no_time_for_is_one_that_was_given_up() -> None:
    world = World()
    late = ModelUnavailableError("did not answer in time", out_of_time=True)
    for _ in range(5):
        world.router.begin("small", None).lost(late)
    assert world.router.health()["small"].healthy
    (family,) = world.metrics.model_calls.collect()
    outcomes = {s.labels["outcome"] for s in family.samples if s.name.endswith("_total")}
    assert outcomes == {"cancelled"}


def test_a_limit_keeps_calls_away_until_it_ends() -> None:
    world = World()
    world.router.begin("small", None).lost(ModelRateLimitedError("", retry_after_s=7.0))
    world.router.begin("large", None).lost(ModelRateLimitedError(""))
    assert (world.router.wait_s("small"), world.router.wait_s("large")) == (7.0, 1.0)
    assert world.router.health()["small"].healthy
    world.clock.advance(7)
    assert world.router.wait_s("small") == 0


def test_the_gauge_follows_the_breaker_back() -> None:
    world = World()
    world.open("small")
    world.clock.advance(5)
    world.router.begin("small", None).answered(Usage())
    assert world.counted("agentray_breaker_open", model="small") == 0
    assert world.router.health()["small"].healthy


def test_a_probe_that_was_cancelled_leaves_room_for_the_next() -> None:
    world = World()
    world.open("small")
    world.clock.advance(5)
    probe = world.router.begin("small", None)
    assert world.router.wait_s("small") > 0
    probe.cancelled()
    assert world.router.wait_s("small") == 0


def test_health_is_told_for_each_model_with_its_reason() -> None:
    world = World(served=("large",))
    world.open("small")
    world.health["large"] = ModelHealth(healthy=False, reason="no accelerator")
    assert world.router.health() == {
        "small": ModelHealth(healthy=False, reason="it broke"),
        "large": ModelHealth(healthy=False, reason="no accelerator"),
    }


@pytest.mark.parametrize(
    ("error", "elsewhere"),
    [
        (BROKEN, True),
        (ModelRateLimitedError(""), True),
        (ModelContextLengthError(""), True),
        (ModelError("", status=401), True),
        (ModelError("", status=404), True),
        (ModelError("", status=400), False),
        (ModelError(""), False),
        (ModelNotFoundError(""), False),
    ],
)
def test_what_another_model_may_answer(error: ModelError, elsewhere: bool) -> None:
    assert may_succeed_elsewhere(error) is elsewhere


def test_a_call_that_can_wait_waits_for_a_gate_a_breaker_and_for_room() -> None:
    world = World({"a": {"max_concurrent": 4}, "b": {}}, served=("b",))
    router = world.router
    assert router.spare_s("a", 0.5) == router.spare_s("b", 0.5) == router.spare_s("none", 0.5) == 0
    first, second = router.begin("a", None), router.begin("a", None)
    assert router.spare_s("a", 0.5) > 0
    assert router.spare_s("a", 0.75) == 0
    first.answered(USAGE)
    assert router.spare_s("a", 0.5) == 0
    second.lost(ModelRateLimitedError("slow down", retry_after_s=7.0))
    assert router.spare_s("a", 0.5) == pytest.approx(7.0)
    world.health["b"] = ModelHealth(healthy=False, reason="it does not load")
    assert router.spare_s("b", 0.5) > 0
    world.health.clear()
    world.open("b")
    assert router.spare_s("b", 0.5) == pytest.approx(5.0)
