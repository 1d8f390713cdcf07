"""One model call with all that belongs around it."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from typing import Any

import pytest
from msgspec.structs import replace

from agentray.clock import Clock, ManualClock, SystemClock
from agentray.config.settings import ModelsSettings
from agentray.errors import ModelError, ModelRateLimitedError, ModelUnavailableError
from agentray.events import Route, ToolCall, Usage
from agentray.models.base import Bill, ModelProgress, ModelRequest
from agentray.models.cache import ResponseCache, request_key
from agentray.models.calls import ModelCalls
from agentray.models.catalog import Catalog
from agentray.models.router import Router
from agentray.telemetry.metrics import Metrics
from tests.unit.models.played import PlayedModels, said, whole
from tests.unit.models.test_cache import MemoryAnswers, settled

PRICE = {"input": 1.0, "output": 4.0}
DOLLARS = 3.0
BROKEN = "it broke"

REQUEST = ModelRequest(model="a", messages=b'{"role":"user","content":"hi"}')
HEDGED = replace(REQUEST, route=Route("answer", ["a", "b"], "r", hedge="b"))
COLD = replace(REQUEST, temperature=0.0)


def broken(**fields: Any) -> ModelUnavailableError:
    return ModelUnavailableError(BROKEN, **fields)


class World:
    """``ModelCalls`` over models ``a`` and ``b``."""

    def __init__(
        self,
        models: PlayedModels,
        *,
        clock: Clock | None = None,
        cached: bool = False,
        **settings: Any,
    ) -> None:
        endpoints = {name: {"url": "http://h/v1", "card": {"price": PRICE}} for name in "ab"}
        configured = ModelsSettings.model_validate({"endpoints": endpoints, **settings})
        self.models = models
        self.clock = clock or ManualClock()
        self.metrics = Metrics()
        self.router = Router(
            Catalog(configured, ""),
            configured,
            clock=self.clock,
            metrics=self.metrics,
            rng=random.Random(1),
        )
        time = ManualClock()
        self.answers = MemoryAnswers(time)
        self.cache = ResponseCache(self.answers, configured.cache, time, self.metrics, owner="o")
        cache = self.cache if cached else None
        self.calls = ModelCalls(self.router, models, configured, cache)

    async def ask(self, request: ModelRequest = REQUEST) -> list[ModelProgress]:
        return [progress async for progress in self.calls.stream(request)]

    def outcomes(self) -> dict[tuple[str, str], float]:
        (family,) = self.metrics.model_calls.collect()
        return {
            (sample.labels["model"], sample.labels["outcome"]): sample.value
            for sample in family.samples
            if sample.name.endswith("_total")
        }

    def running(self) -> list[int]:
        return [self.router._models[name].running for name in "ab"]


def text_of(progresses: list[ModelProgress]) -> str:
    return "".join(progress.text for progress in progresses)


# One call


async def test_an_answer_comes_as_it_is_and_ends_with_what_it_cost() -> None:
    world = World(PlayedModels(a=[[said("Hel"), said("lo"), whole("!")]]))
    *before, last = await world.ask()
    assert before == [said("Hel"), said("lo")]
    assert last == replace(whole("!"), cost=DOLLARS)
    assert world.outcomes() == {("a", "answered"): 1}
    assert world.running() == [0, 0]


async def test_what_the_check_finds_is_told_with_the_last_of_it() -> None:
    seen: list[tuple[str, tuple[ToolCall, ...]]] = []

    def check(text: str, calls: tuple[ToolCall, ...]) -> str:
        seen.append((text, calls))
        return "it is wrong"

    call = ToolCall("c", "echo", "{}")
    world = World(PlayedModels(a=[[said("let me "), whole("see", "tool_calls", call)]]))
    *_, last = await world.ask(replace(REQUEST, check=check))
    assert (last.problem, last.cost) == ("it is wrong", DOLLARS)
    assert seen == [("let me see", (call,))]
    assert world.outcomes() == {("a", "rejected"): 1}


@pytest.mark.parametrize("reason", ["length", "content_filter"])
@pytest.mark.parametrize("cached", [False, True])
async def test_a_text_that_was_cut_is_not_checked_as_a_whole(reason: str, cached: bool) -> None:
    go = asyncio.Event()
    script = [go, whole('{"n":', reason)]
    world = World(PlayedModels(a=[script, script]), cached=cached)
    request = replace(COLD, check=lambda text, calls: "it is no JSON")
    asking = [asyncio.create_task(world.ask(request)) for _ in range(2)]
    await settled()
    go.set()
    for *_, last in await asyncio.gather(*asking):
        assert (last.problem, last.finish_reason) == (None, reason)
    # From the cache it is another's answer that both have.
    assert world.outcomes() == {("a", "answered"): 1 if cached else 2}


async def test_tool_calls_that_were_cut_are_checked() -> None:
    world = World(PlayedModels(a=[[whole("", "length", ToolCall("c", "echo", "{"))]]))
    *_, last = await world.ask(replace(REQUEST, check=lambda text, calls: "it is wrong"))
    assert last.problem == "it is wrong"


async def test_a_lost_call_says_what_it_cost_as_far_as_that_can_be_told() -> None:
    world = World(PlayedModels(a=[[said("x" * 4_000), broken()]]))
    with pytest.raises(ModelUnavailableError) as caught:
        await world.ask(replace(REQUEST, messages=b"m" * 4_000))
    # A thousand tokens each: four bytes are one.
    assert caught.value.fields["cost"] == pytest.approx(1_000 * (1 + 4) / 1e6)
    assert world.outcomes() == {("a", "lost"): 1}


async def test_a_call_that_never_said_anything_cost_nothing() -> None:
    world = World(PlayedModels(a=[[broken()]]))
    with pytest.raises(ModelUnavailableError) as caught:
        await world.ask()
    assert "cost" not in caught.value.fields


async def test_a_caller_that_leaves_cancels_its_call() -> None:
    world = World(PlayedModels(a=[[said("a"), said("b"), whole()]]))
    async with aclosing(world.calls.stream(REQUEST)) as answer:
        assert await anext(answer) == said("a")
    assert world.outcomes() == {("a", "cancelled"): 1}
    assert world.models.closed == ["a"]
    assert world.running() == [0, 0]


@pytest.mark.parametrize("cached", [False, True])
async def test_what_a_cancelled_call_cost_is_on_the_bill(cached: bool) -> None:
    world = World(PlayedModels(a=[[said("x" * 4_000), asyncio.Event()]]), cached=cached)
    bill = Bill()
    async with aclosing(world.calls.stream(replace(COLD, bill=bill))) as answer:
        await anext(answer)
    assert bill.cost == pytest.approx((len(COLD.messages) // 4 + 1_000 * 4) / 1e6)


async def test_what_an_answer_or_an_error_tells_is_not_on_the_bill() -> None:
    bill = Bill()
    world = World(PlayedModels(a=[[said("x"), whole()], [said("x" * 4_000), broken()]]))
    await world.ask(replace(REQUEST, bill=bill))
    with pytest.raises(ModelUnavailableError):
        await world.ask(replace(REQUEST, bill=bill))
    assert bill.cost == 0


async def test_a_task_that_is_cancelled_while_it_waits_cancels_its_call() -> None:
    world = World(PlayedModels(a=[[asyncio.Event(), whole()]]))
    asking = asyncio.create_task(world.ask())
    await settled()
    assert world.running() == [1, 0]
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert world.outcomes() == {("a", "cancelled"): 1}
    assert world.models.closed == ["a"]


# The breaker

QUICK: dict[str, Any] = {"breaker": {"min_calls": 1, "open_s": 0.01}}


async def test_an_open_breaker_is_waited_for_and_its_probe_closes_it() -> None:
    models = PlayedModels(a=[[broken()], [whole("back")]])
    world = World(models, clock=SystemClock(), **QUICK)
    with pytest.raises(ModelUnavailableError):
        await world.ask()
    assert not world.router.health()["a"].healthy
    assert text_of(await world.ask()) == "back"
    assert world.router.health()["a"].healthy


async def test_calls_that_wait_for_a_probe_go_on_when_it_has_closed_the_breaker() -> None:
    models = PlayedModels(a=[[broken()], [whole("1")], [whole("2")], [whole("3")]])
    world = World(models, clock=SystemClock(), **QUICK)
    with pytest.raises(ModelUnavailableError):
        await world.ask()
    answers = await asyncio.gather(*(world.ask() for _ in range(3)))
    assert sorted(map(text_of, answers)) == ["1", "2", "3"]


async def test_a_probe_that_is_cancelled_makes_way_for_the_next() -> None:
    models = PlayedModels(a=[[broken()], [asyncio.Event()], [whole("back")]])
    world = World(models, clock=SystemClock(), **QUICK)
    with pytest.raises(ModelUnavailableError):
        await world.ask()
    probe = asyncio.ensure_future(world.ask())
    async with asyncio.timeout(5):
        while len(models.called) < 2:  # noqa: ASYNC110 - the probe waits for the clock
            await asyncio.sleep(0.001)
    probe.cancel()
    await asyncio.wait({probe})
    assert text_of(await world.ask()) == "back"


async def test_a_limit_is_waited_out() -> None:
    limited = ModelRateLimitedError("slow down", retry_after_s=0.02)
    world = World(PlayedModels(a=[[limited], [whole("ok")]]), clock=SystemClock())
    with pytest.raises(ModelRateLimitedError):
        await world.ask()
    assert world.router.wait_s("a") > 0
    assert text_of(await world.ask()) == "ok"


async def test_what_was_waited_for_a_model_its_call_has_not() -> None:
    limited = ModelRateLimitedError("slow down", retry_after_s=0.05)
    world = World(PlayedModels(a=[[limited], [whole("ok")]]), clock=SystemClock())
    with pytest.raises(ModelRateLimitedError):
        await world.ask()
    await world.ask(replace(REQUEST, timeout_s=10.0))
    left_s = world.models.requests[1].timeout_s
    assert left_s is not None
    assert 5.0 < left_s <= 9.97


@pytest.mark.parametrize(
    ("about", "settings"),
    [
        ({}, {"first_token_timeout_s": 59.0}),
        ({"timeout_s": 59.0}, {}),
        ({"patient": False}, {"first_token_timeout_s": 600.0}),
    ],
    ids=["longer than a first token may", "longer than the step has", "another one is there"],
)
async def test_who_would_wait_too_long_is_sent_away_at_once(
    about: dict[str, Any], settings: dict[str, Any]
) -> None:
    limited = ModelRateLimitedError("slow down", retry_after_s=59.5)
    world = World(PlayedModels(a=[[limited]]), **settings)
    with pytest.raises(ModelRateLimitedError):
        await world.ask()
    with pytest.raises(ModelRateLimitedError, match=r"left alone for 59\.5 s") as caught:
        async with asyncio.timeout(0.4):
            await world.ask(replace(REQUEST, **about))
    assert caught.value.fields["retry_after_s"] == 59.5
    assert world.models.called == ["a"]
    assert world.outcomes() == {("a", "lost"): 1}


async def test_a_model_that_is_no_longer_there_is_said_so() -> None:
    with pytest.raises(ModelError, match="there is no model 'gone'"):
        await World(PlayedModels()).ask(replace(REQUEST, model="gone"))


# The hedge

HEDGE: dict[str, Any] = {"routing": {"hedge_after_s": 0.01}}


async def test_a_late_first_token_calls_another_model_and_the_first_to_speak_goes_on() -> None:
    models = PlayedModels(a=[[asyncio.Event(), whole("late")]], b=[[said("I am "), whole("here")]])
    world = World(models, **HEDGE)
    progresses = await world.ask(HEDGED)
    assert text_of(progresses) == "I am here"
    assert [progress.model for progress in progresses] == [None, "b"]
    assert world.outcomes() == {("a", "cancelled"): 1, ("b", "answered"): 1}
    assert models.closed == ["a", "b"]
    assert not models.requests[1].patient
    assert world.running() == [0, 0]


async def test_a_hedge_has_what_is_left_of_the_steps_time() -> None:
    models = PlayedModels(a=[[asyncio.Event()]], b=[[whole("here")]])
    world = World(models, routing={"hedge_after_s": 0.05})
    await world.ask(replace(HEDGED, timeout_s=10.0))
    left_s = models.requests[1].timeout_s
    assert left_s is not None
    assert 5.0 < left_s <= 9.96


async def test_a_hedge_that_would_come_behind_the_steps_time_is_not_called() -> None:
    speak = asyncio.Event()
    models = PlayedModels(a=[[speak, whole("late")]])
    world = World(models, routing={"hedge_after_s": 0.02})
    asking = asyncio.create_task(world.ask(replace(HEDGED, timeout_s=0.01)))
    await asyncio.wait({asking}, timeout=0.05)
    speak.set()
    assert text_of(await asking) == "late"
    assert models.called == ["a"]


@pytest.mark.parametrize(
    ("hedges", "cost"),
    [
        ([said("y" * 4_000), asyncio.Event()], (len(REQUEST.messages) // 4 + 1_000 * 4) / 1e6),
        ([whole("y")], DOLLARS),
        ([broken(cost=0.5)], 0.5),
    ],
    ids=["spoke", "was whole", "failed"],
)
@pytest.mark.parametrize("ends", ["well", "badly", "cancelled"])
async def test_what_the_one_that_lost_has_cost_is_told_with_the_others_end(
    hedges: list[Any], cost: float, ends: str
) -> None:
    go, hedged, bill = asyncio.Event(), asyncio.Event(), Bill()
    end = {"well": whole(), "badly": broken(cost=0.0), "cancelled": asyncio.Event()}[ends]
    # Both speak at once, and the first one is taken.
    models = PlayedModels(a=[[go, said("x"), end]], b=[[hedged.set, go, *hedges]])
    world = World(models, **HEDGE)
    own = (len(REQUEST.messages) // 4 + 4) / 1e6
    asking = asyncio.create_task(world.ask(replace(HEDGED, bill=bill)))
    async with asyncio.timeout(5):
        await hedged.wait()
    go.set()
    if ends == "well":
        assert (await asking)[-1].cost == pytest.approx(DOLLARS + cost)
        assert bill.cost == 0
    elif ends == "badly":
        with pytest.raises(ModelUnavailableError) as caught:
            await asking
        assert caught.value.fields["cost"] == pytest.approx(own + cost)
        assert bill.cost == 0
    else:
        await settled()
        asking.cancel()
        await asyncio.wait({asking})
        assert bill.cost == pytest.approx(own + cost)


async def test_a_model_that_others_overtake_fails_if_it_stays_silent_for_too_long() -> None:
    models = PlayedModels(a=[[asyncio.Event()]] * 2, b=[[whole("1")], [whole("2")]])
    world = World(models, breaker={"min_calls": 1}, **HEDGE)
    await world.ask(HEDGED)
    assert world.outcomes()["a", "cancelled"] == 1
    assert world.router.health()["a"].healthy
    world.calls._silent_since["a"] -= 60.0
    await world.ask(HEDGED)
    assert world.outcomes()["a", "lost"] == 1
    assert "has said nothing for 60 s" in (world.router.health()["a"].reason or "")


async def test_a_model_that_speaks_in_between_is_only_slow() -> None:
    models = PlayedModels(
        a=[[asyncio.Event()], [whole("x")], [asyncio.Event()]], b=[[whole("1")], [whole("2")]]
    )
    world = World(models, breaker={"min_calls": 1}, **HEDGE)
    await world.ask(HEDGED)
    world.calls._silent_since["a"] -= 60.0
    await world.ask()
    await world.ask(HEDGED)
    assert world.outcomes()["a", "cancelled"] == 2
    assert ("a", "lost") not in world.outcomes()


async def test_a_first_token_in_time_calls_nobody_else() -> None:
    models = PlayedModels(a=[[said("quick "), asyncio.Event()]])
    world = World(models, routing={"hedge_after_s": 60.0})
    async with aclosing(world.calls.stream(HEDGED)) as answer:
        assert (await anext(answer)).text == "quick "
    assert models.called == ["a"]
    assert world.outcomes() == {("a", "cancelled"): 1}


async def test_the_first_model_can_still_win() -> None:
    speak, hedged = asyncio.Event(), asyncio.Event()
    models = PlayedModels(a=[[speak, said("first"), whole()]], b=[[hedged.set, asyncio.Event()]])
    world = World(models, **HEDGE)
    asking = asyncio.create_task(world.ask(HEDGED))
    async with asyncio.timeout(5):
        await hedged.wait()
    speak.set()
    progresses = await asking
    assert text_of(progresses) == "first"
    assert {progress.model for progress in progresses} == {None}
    assert world.outcomes() == {("a", "answered"): 1, ("b", "cancelled"): 1}


@pytest.mark.parametrize("first_fails", ["early", "late"])
async def test_one_that_fails_leaves_the_race_to_the_other(first_fails: str) -> None:
    fail, speak, hedged = asyncio.Event(), asyncio.Event(), asyncio.Event()
    models = PlayedModels(a=[[fail, broken()]], b=[[hedged.set, speak, whole("here")]])
    world = World(models, **HEDGE)
    asking = asyncio.create_task(world.ask(HEDGED))
    async with asyncio.timeout(5):
        await hedged.wait()
    fail.set()
    if first_fails == "early":
        await settled()
    speak.set()
    assert text_of(await asking) == "here"
    assert world.outcomes()["b", "answered"] == 1


async def test_a_failure_before_the_hedge_is_the_callers_to_judge() -> None:
    models = PlayedModels(a=[[broken()]])
    world = World(models, routing={"hedge_after_s": 60.0})
    with pytest.raises(ModelUnavailableError, match=BROKEN):
        await world.ask(HEDGED)
    assert models.called == ["a"]


@pytest.mark.parametrize("last", ["a", "b"])
async def test_if_both_fail_the_failure_of_the_first_model_is_raised(last: str) -> None:
    fail_a, fail_b, hedged = asyncio.Event(), asyncio.Event(), asyncio.Event()
    fails = [fail_b, fail_a] if last == "a" else [fail_a, fail_b]
    models = PlayedModels(
        a=[[fail_a, broken(model="a")]], b=[[hedged.set, fail_b, broken(model="b")]]
    )
    world = World(models, **HEDGE)
    asking = asyncio.create_task(world.ask(HEDGED))
    async with asyncio.timeout(5):
        await hedged.wait()
    fails[0].set()
    await settled()
    assert not asking.done()
    fails[1].set()
    with pytest.raises(ModelUnavailableError) as caught:
        await asking
    assert (caught.value.fields["model"], caught.value.fields["answering"]) == ("a", "a")
    assert world.outcomes() == {("a", "lost"): 1, ("b", "lost"): 1}
    assert world.running() == [0, 0]


async def test_a_failure_behind_the_first_token_says_whose_it_is() -> None:
    models = PlayedModels(a=[[asyncio.Event()]], b=[[said("half"), broken()]])
    with pytest.raises(ModelUnavailableError) as caught:
        await World(models, **HEDGE).ask(HEDGED)
    assert caught.value.fields["answering"] == "b"


async def test_a_hedged_call_that_is_cancelled_ends_both() -> None:
    hedged = asyncio.Event()
    models = PlayedModels(a=[[asyncio.Event()]], b=[[hedged.set, asyncio.Event()]])
    world = World(models, **HEDGE)
    asking = asyncio.create_task(world.ask(HEDGED))
    async with asyncio.timeout(5):
        await hedged.wait()
    assert world.running() == [1, 1]
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert world.outcomes() == {("a", "cancelled"): 1, ("b", "cancelled"): 1}
    assert world.running() == [0, 0]


async def test_a_text_that_is_gone_on_with_is_not_hedged() -> None:
    wait = asyncio.Event()
    models = PlayedModels(a=[[wait, whole("on")]])
    world = World(models, **HEDGE)
    asking = asyncio.create_task(world.ask(replace(HEDGED, continue_text=True)))
    await asyncio.wait({asking}, timeout=0.05)
    assert models.called == ["a"]
    wait.set()
    assert text_of(await asking) == "on"


# The cache


async def test_a_miss_streams_through_as_it_comes() -> None:
    more = asyncio.Event()
    world = World(PlayedModels(a=[[said("one "), more, whole("two")]]), cached=True)
    async with aclosing(world.calls.stream(COLD)) as answer:
        assert await anext(answer) == said("one ")
        more.set()
        last = await anext(answer)
    assert last == replace(whole("two"), cost=DOLLARS)


async def test_a_hit_comes_whole_and_costs_nothing() -> None:
    world = World(PlayedModels(a=[[said("one "), whole("two")]]), cached=True)
    await world.ask(COLD)
    [hit] = await world.ask(COLD)
    assert (hit.text, hit.finish_reason, hit.cached, hit.cost) == ("one two", "stop", True, 0.0)
    assert hit.usage == Usage(1_000_000, 500_000, cached_tokens=1_000_000)
    assert world.models.called == ["a"]
    assert world.outcomes() == {("a", "answered"): 1}


async def test_equal_calls_at_the_same_time_make_one() -> None:
    go = asyncio.Event()
    world = World(PlayedModels(a=[[said("one "), go, whole("two")]]), cached=True)
    asking = [asyncio.create_task(world.ask(COLD)) for _ in range(50)]
    await settled()
    go.set()
    answers = await asyncio.gather(*asking)
    assert {text_of(answer) for answer in answers} == {"one two"}
    assert sum(answer[-1].cost for answer in answers) == DOLLARS
    assert [answer[-1].cached for answer in answers].count(False) == 1
    assert world.models.called == ["a"]


async def test_the_one_whose_call_it_was_can_leave_the_others_to_it() -> None:
    go = asyncio.Event()
    world = World(PlayedModels(a=[[said("one "), go, whole("two")]]), cached=True)
    first = asyncio.create_task(world.ask(COLD))
    await settled()
    second = asyncio.create_task(world.ask(COLD))
    await settled()
    first.cancel()
    await asyncio.wait({first})
    go.set()
    [last] = await second
    assert (last.text, last.cached, last.cost) == ("one two", False, DOLLARS)
    assert last.usage == whole().usage
    assert world.outcomes() == {("a", "answered"): 1}


async def test_if_all_leave_the_call_ends() -> None:
    world = World(PlayedModels(a=[[said("one "), asyncio.Event()]]), cached=True)
    async with aclosing(world.calls.stream(COLD)) as answer:
        await anext(answer)
    await settled()
    assert world.outcomes() == {("a", "cancelled"): 1}
    await world.cache.close()


async def test_a_lost_call_is_lost_for_all_that_shared_it_and_is_made_again() -> None:
    go = asyncio.Event()
    world = World(PlayedModels(a=[[said("half"), go, broken()], [whole("ok")]]), cached=True)
    asking = [asyncio.create_task(world.ask(COLD)) for _ in range(3)]
    await settled()
    go.set()
    results = await asyncio.gather(*asking, return_exceptions=True)
    assert {type(result) for result in results} == {ModelUnavailableError}
    # It was one call: one of them accounts for it.
    costs = [result.fields.get("cost") for result in results if isinstance(result, ModelError)]
    assert (costs.count(None), len(costs)) == (2, 3)
    assert text_of(await world.ask(COLD)) == "ok"


@pytest.mark.parametrize("reason", ["stop", "tool_calls"])
async def test_a_rejected_answer_is_shared_with_its_problem_and_not_kept(reason: str) -> None:
    go = asyncio.Event()
    models = PlayedModels(a=[[go, whole("bad", reason)], [whole("good")]])
    world = World(models, cached=True)

    def check(text: str, calls: tuple[ToolCall, ...]) -> str | None:
        return None if text == "good" else "it is bad"

    request = replace(COLD, check=check)
    asking = [asyncio.create_task(world.ask(request)) for _ in range(3)]
    await settled()
    go.set()
    for answer in await asyncio.gather(*asking):
        assert (answer[-1].problem, answer[-1].finish_reason) == ("it is bad", reason)
    [good] = await world.ask(request)
    assert (good.text, good.cached, good.problem) == ("good", False, None)
    assert models.called == ["a", "a"]


async def test_a_kept_answer_is_checked_for_each_that_asks() -> None:
    world = World(PlayedModels(a=[[whole("fine")]]), cached=True)
    await world.ask(COLD)
    [hit] = await world.ask(replace(COLD, check=lambda text, calls: f"no {text}"))
    assert (hit.cached, hit.problem) == (True, "no fine")


async def test_the_answer_of_a_hedge_is_not_kept_as_the_models_own() -> None:
    models = PlayedModels(a=[[asyncio.Event()], [whole("mine")]], b=[[whole("not yours")]])
    world = World(models, cached=True, **HEDGE)
    request = replace(HEDGED, temperature=0.0)
    assert text_of(await world.ask(request)) == "not yours"
    assert text_of(await world.ask(request)) == "mine"


async def test_all_that_share_the_answer_of_a_hedge_are_told_whose_it_is() -> None:
    models = PlayedModels(a=[[asyncio.Event()]], b=[[whole("not yours")]])
    world = World(models, cached=True, **HEDGE)
    request = replace(HEDGED, temperature=0.0)
    answers = await asyncio.gather(*(world.ask(request) for _ in range(3)))
    assert [answer[-1].model for answer in answers] == ["b", "b", "b"]


async def test_who_shares_a_call_does_not_wait_longer_than_his_step_has_time() -> None:
    go = asyncio.Event()
    world = World(PlayedModels(a=[[go, whole("late")]]), cached=True)
    first = asyncio.create_task(world.ask(COLD))
    await settled()
    with pytest.raises(ModelUnavailableError, match="did not answer in time") as caught:
        await world.ask(replace(COLD, timeout_s=0.01))
    assert caught.value.fields["out_of_time"]
    go.set()
    assert text_of(await first) == "late"


async def test_what_was_waited_for_another_host_the_call_has_not() -> None:
    world = World(PlayedModels(a=[[whole("x")]]), cached=True)
    key = request_key(COLD.tenant, COLD)
    world.answers.marks[key.digest] = ("another host", 60.0)
    asyncio.get_running_loop().call_later(0.05, world.answers.marks.clear)
    await world.ask(replace(COLD, timeout_s=10.0))
    left_s = world.models.requests[0].timeout_s
    assert left_s is not None
    assert 5.0 < left_s <= 9.96


@pytest.mark.parametrize(
    "request_",
    [
        REQUEST,
        replace(COLD, cache=False),
        replace(COLD, tools=b"{}"),
        replace(COLD, continue_text=True),
    ],
    ids=["warm", "forbidden", "tools", "continued"],
)
async def test_what_may_not_be_kept_is_called_each_time(request_: ModelRequest) -> None:
    world = World(PlayedModels(a=[[whole("1")], [whole("2")]]), cached=True)
    assert text_of(await world.ask(request_)) == "1"
    assert text_of(await world.ask(request_)) == "2"


async def test_an_own_opinion_decides_before_the_temperature() -> None:
    world = World(PlayedModels(a=[[whole("1")]]), cached=True)
    request = replace(REQUEST, cache=True, tools=b"{}")
    await world.ask(request)
    [hit] = await world.ask(request)
    assert hit.cached
