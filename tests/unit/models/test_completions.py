"""Stateless completions: routed, tried elsewhere, taken down, and answered once."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Mapping
from typing import Any

import pytest

from agentray.clock import Clock, ManualClock, SystemClock
from agentray.config.settings import ModelsSettings
from agentray.errors import (
    InvalidRequestError,
    ModelContextLengthError,
    ModelError,
    ModelNotFoundError,
    ModelRateLimitedError,
    ModelUnavailableError,
)
from agentray.events import Usage
from agentray.models.cache import ResponseCache, completion_key
from agentray.models.catalog import Catalog
from agentray.models.completions import Completion, Completions, CompletionStream
from agentray.models.policies import NoModelError
from agentray.models.router import Router
from agentray.telemetry.metrics import Metrics
from tests.unit.models.test_cache import MemoryAnswers, settled

HI: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
COLD = {**HI, "temperature": 0}
STREAMED = {**HI, "stream": True}
BROKEN = ModelUnavailableError("it broke")


def answer(text: str = "yes", **usage: Any) -> bytes:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return json.dumps({"choices": [choice], "usage": usage or None}).encode()


class Stream:
    """A streamed answer of two chunks; an error among them is raised."""

    text = ""
    ended = False
    calls_tools = False

    def __init__(self, *items: bytes | Exception, usage: Usage = Usage()) -> None:
        self._items = list(items)
        self.usage = usage
        self.chunks = 0
        self.closed = False

    async def __anext__(self) -> bytes:
        if not self._items:
            raise StopAsyncIteration
        item = self._items.pop(0)
        if isinstance(item, Exception):
            raise item
        self.chunks += 1
        return item

    async def aclose(self) -> None:
        self.closed = True


class Client:
    """Plays what is prepared for each model, call by call; an event is waited for."""

    def __init__(self, **scripts: list[Any]) -> None:
        self.scripts = scripts
        self.called: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.timeouts: list[float] = []
        self.sessions: list[str | None] = []

    async def complete_raw(
        self,
        model: str,
        body: Mapping[str, Any],
        *,
        session_id: str | None = None,
        timeout_s: float | None = None,
        continues: bool = False,
    ) -> Any:
        assert timeout_s is not None
        self.called.append(model)
        self.bodies.append({name: body[name] for name in body})
        self.timeouts.append(timeout_s)
        self.sessions.append(session_id)
        item = self.scripts[model].pop(0)
        if isinstance(item, tuple):
            event, item = item
            await event.wait()
        if isinstance(item, Exception):
            raise item
        return item


CARDS: dict[str, Any] = {
    "a": {"tier": "small", "context_window": 1_000, "price": {"input": 1.0, "output": 4.0}},
    "b": {"tier": "large", "context_window": 9_000, "price": {"input": 9.0, "output": 9.0}},
}


class World:
    def __init__(
        self,
        client: Client,
        *,
        cards: dict[str, Any] | None = None,
        clock: Clock | None = None,
        cached: bool = False,
        **settings: Any,
    ) -> None:
        endpoints = {
            name: {"url": "http://h/v1", "card": card} for name, card in (cards or CARDS).items()
        }
        settings.setdefault("routing", {"holdout": 0.0})
        configured = ModelsSettings.model_validate({"endpoints": endpoints, **settings})
        self.client = client
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
        cache = ResponseCache(self.answers, configured.cache, time, self.metrics, owner="o")
        self.completions = Completions(
            self.router,
            client,  # type: ignore[arg-type]
            configured,
            cache if cached else None,
        )

    async def ask(
        self, body: bytes | dict[str, Any] = HI, model: str | None = None, **about: Any
    ) -> Completion:
        return await self.completions.complete(model, body, **about)

    async def stream(self, body: dict[str, Any] = STREAMED, **about: Any) -> CompletionStream:
        completion = await self.ask(body, **about)
        assert isinstance(completion.body, CompletionStream)
        return completion.body

    def outcomes(self) -> list[tuple[str, str]]:
        (family,) = self.metrics.model_calls.collect()
        return sorted(
            (sample.labels["model"], sample.labels["outcome"])
            for sample in family.samples
            if sample.name.endswith("_total")
            for _ in range(int(sample.value))
        )

    def tokens(self, direction: str, model: str = "a") -> float:
        labels = {"model": model, "direction": direction}
        return self.metrics.registry.get_sample_value("agentray_model_tokens_total", labels) or 0.0

    def running(self) -> int:
        return sum(model.running for model in self.router._models.values())


# Where a completion goes


@pytest.mark.parametrize("usage", ['{"prompt_tokens": 12.5}', "[]", '"1"', '{"prompt_tokens": -1}'])
async def test_an_answer_ends_its_call_whatever_it_says_of_its_tokens(usage: str) -> None:
    body = answer().replace(b"null", usage.encode())
    clock = ManualClock()
    world = World(Client(a=[body]), clock=clock, breaker={"min_calls": 1, "open_s": 5.0})
    world.router.begin("a", None).lost(BROKEN)
    clock.advance(6.0)
    # It is the probe that finds the model back.
    assert (await world.ask(model="a")).body == body
    assert world.router.wait_s("a") == 0
    assert world.running() == 0
    assert world.tokens("input") == world.tokens("output") == 0


async def test_more_cached_tokens_than_there_were_are_all_of_them() -> None:
    body = answer(prompt_tokens=5, prompt_tokens_details={"cached_tokens": 2_000})
    world = World(Client(a=[body]))
    await world.ask()
    assert [world.tokens(of) for of in ("input", "cached")] == [0, 5]


async def test_a_large_image_does_not_need_a_long_window() -> None:
    sees = {"modalities": ["text", "image"]}
    cards = {
        "a": {**CARDS["a"], **sees, "context_window": 4_000},
        "b": {**CARDS["b"], **sees, "context_window": 90_000},
    }
    image = {"url": "data:image/png;base64," + "A" * 100_000}
    content = [{"type": "image_url", "image_url": image}]
    routing = {"holdout": 0.0, "difficulty": 1.0}
    world = World(Client(a=[answer()]), cards=cards, routing=routing)
    completion = await world.ask({"messages": [{"role": "user", "content": content}]})
    assert completion.model == "a"


async def test_a_probe_whose_stream_has_begun_has_found_its_model_back() -> None:
    clock = ManualClock()
    raw = Stream(b"data: 1\n\n")
    world = World(Client(a=[raw]), clock=clock, breaker={"min_calls": 1, "open_s": 5.0})
    world.router.begin("a", None).lost(BROKEN)
    clock.advance(6.0)
    stream = await world.stream(model="a")
    assert world.router.health()["a"].healthy
    await stream.aclose()


async def test_an_answer_is_passed_on_as_it_came_and_taken_down() -> None:
    body = answer(
        prompt_tokens=100, completion_tokens=20, prompt_tokens_details={"cached_tokens": 40}
    )
    world = World(Client(a=[body]))
    completion = await world.ask(session_id="s")
    assert (completion.body, completion.model, completion.cached) == (body, "a", False)
    assert completion.route.candidates == ["a", "b"]
    assert world.client.sessions == ["s"]
    assert world.client.bodies == [HI]
    assert world.outcomes() == [("a", "answered")]
    assert [world.tokens(of) for of in ("input", "cached", "output")] == [60, 40, 20]


@pytest.mark.parametrize(
    ("body", "model", "kind"),
    [
        (HI, "a", "answer"),
        ({"messages": [{"role": "user", "content": "Summarize: prove, design, plan"}]}, "a", None),
        ({"messages": [{"role": "user", "content": "Prove it by design."}]}, "b", "answer"),
        ({**HI, "tools": [{}]}, "a", "plan"),
        ({**HI, "tools": [{}] * 9}, "b", "plan"),
        ({**HI, "tools": []}, "a", "answer"),
        ({"messages": [{"role": "tool", "content": "Prove it."}]}, "a", "tool_follow_up"),
        ({**HI, "response_format": {"type": "json_schema", "json_schema": {}}}, "a", "format"),
        ({**HI, "max_tokens": 2_000}, "b", "answer"),
        ({**HI, "max_completion_tokens": 2_000}, "b", "answer"),
        ({"messages": [{"role": "user", "content": "x" * 4_100}] * 2}, "b", "answer"),
        ({"messages": []}, "a", "answer"),
        ({}, "a", "answer"),
    ],
)
async def test_the_step_is_seen_from_the_body(
    body: dict[str, Any], model: str, kind: str | None
) -> None:
    completion = await World(Client(a=[answer()], b=[answer()])).ask(body)
    assert completion.model == model
    if kind is not None:
        assert completion.route.kind == kind


async def test_a_body_of_bytes_is_the_same_as_one_that_is_read() -> None:
    world = World(Client(a=[answer()]))
    await world.ask(json.dumps(HI).encode())
    assert {name: json.loads(bytes(v)) for name, v in world.client.bodies[0].items()} == HI


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b"\xff", {"messages": "hi"}, {**HI, "stream": "yes"}, {**HI, "n": "2"}]
)
async def test_a_body_that_is_no_completions_is_refused(body: Any) -> None:
    with pytest.raises(InvalidRequestError):
        await World(Client()).ask(body)


async def test_the_named_model_is_the_only_one() -> None:
    world = World(Client(b=[ModelError("no right", status=403)]))
    with pytest.raises(ModelError, match="no right"):
        await world.ask(model="b", preferred="a", allowed=("a",))
    assert world.client.called == ["b"]
    with pytest.raises(ModelNotFoundError):
        await world.ask(model="none")


async def test_the_agents_models_and_preference_decide_for_those_who_name_none() -> None:
    world = World(Client(a=[answer()], b=[answer(), answer()]), default="b")
    assert (await world.ask()).model == "b"
    assert (await world.ask(preferred="a")).model == "a"
    assert (await world.ask(allowed=("b",), preferred="a")).model == "b"
    with pytest.raises(NoModelError):
        await world.ask(allowed=("gone",))


# What fails before its first token


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (BROKEN, "the others failed this step"),
        (ModelRateLimitedError("slow down", retry_after_s=9.0), "the others are unhealthy"),
        (ModelError("bad key", status=401), "the others failed this step"),
        (ModelError("no such model", status=404), "the others failed this step"),
    ],
)
async def test_what_fails_is_tried_elsewhere_at_once(error: ModelError, why: str) -> None:
    world = World(Client(a=[error], b=[answer("b")]))
    completion = await world.ask()
    assert (completion.body, completion.model) == (answer("b"), "b")
    assert why in completion.route.reason
    assert world.outcomes() == [("a", "lost"), ("b", "answered")]


@pytest.mark.parametrize("error", [ModelError("bad request", status=400), ModelError("withheld")])
async def test_what_no_model_answers_is_raised_at_once(error: ModelError) -> None:
    world = World(Client(a=[error]))
    with pytest.raises(ModelError, match=error.message):
        await world.ask()
    assert world.client.called == ["a"]


async def test_a_bad_key_is_not_tried_again_where_there_is_no_other_model() -> None:
    world = World(Client(a=[ModelError("bad key", status=401)]), cards={"a": CARDS["a"]})
    with pytest.raises(ModelError, match="bad key"):
        await world.ask()
    assert world.client.called == ["a"]


async def test_both_models_with_bad_keys_are_each_asked_once() -> None:
    bad = ModelError("bad key", status=401)
    world = World(Client(a=[bad], b=[bad]), attempts=9)
    with pytest.raises(ModelError, match="bad key"):
        await world.ask()
    assert world.client.called == ["a", "b"]


async def test_a_step_makes_the_attempts_that_it_may_and_the_last_error_is_raised() -> None:
    last = ModelUnavailableError("the last one")
    world = World(Client(a=[BROKEN, last], b=[BROKEN]), attempts=3)
    with pytest.raises(ModelUnavailableError, match="the last one"):
        await world.ask()
    assert world.client.called == ["a", "b", "a"]
    assert world.running() == 0


async def test_the_only_model_is_asked_again_after_a_while() -> None:
    world = World(Client(a=[BROKEN, answer()]), cards={"a": CARDS["a"]})
    assert (await world.ask()).body == answer()
    first, second = world.client.timeouts
    # All of it is one step's time: half of the first pause at least is gone.
    assert second <= first - 0.05


async def test_a_limit_is_waited_out_where_there_is_no_other_model() -> None:
    limited = ModelRateLimitedError("slow down", retry_after_s=0.02)
    world = World(Client(a=[limited, answer()]), cards={"a": CARDS["a"]}, clock=SystemClock())
    assert (await world.ask()).body == answer()


async def test_an_open_breaker_is_waited_out_where_there_is_no_other_model() -> None:
    world = World(
        Client(a=[BROKEN, answer()]),
        cards={"a": CARDS["a"]},
        clock=SystemClock(),
        breaker={"min_calls": 1, "open_s": 0.2},
    )
    assert (await world.ask()).body == answer()


async def test_nothing_is_tried_behind_the_deadline() -> None:
    slow = ModelRateLimitedError("slow down", retry_after_s=9.0)
    world = World(Client(a=[slow]), cards={"a": CARDS["a"]}, step_timeout_s=5.0)
    with pytest.raises(ModelRateLimitedError, match=r"^slow down$"):
        async with asyncio.timeout(2):
            await world.ask()
    assert world.client.called == ["a"]
    assert 4.5 < world.client.timeouts[0] <= 5.0


async def test_a_model_that_is_left_alone_is_not_called() -> None:
    world = World(Client(), breaker={"min_calls": 1})
    for name in "ab":
        world.router.begin(name, None).lost(BROKEN)
    with pytest.raises(ModelUnavailableError, match="left alone") as caught:
        await world.ask()
    assert caught.value.fields["retry_after_s"] == 5.0


async def test_a_caller_that_leaves_cancels_the_call() -> None:
    world = World(Client(a=[(asyncio.Event(), answer())]))
    asking = asyncio.create_task(world.ask())
    await settled()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert world.outcomes() == [("a", "cancelled")]
    assert world.running() == 0


# A context that is too long

TOO_LONG = ModelContextLengthError("too long", status=400)


async def test_a_prompt_that_is_too_long_goes_to_a_longer_window() -> None:
    shorter = {"tier": "small", "context_window": 500}
    world = World(Client(a=[TOO_LONG], b=[answer()]), cards={**CARDS, "c": shorter})
    completion = await world.ask(preferred="a")
    assert completion.model == "b"
    assert world.client.called == ["a", "b"]


async def test_it_does_so_once() -> None:
    world = World(
        Client(a=[TOO_LONG], b=[TOO_LONG]),
        cards={**CARDS, "c": {**CARDS["b"], "context_window": 10_000}},
        attempts=9,
    )
    with pytest.raises(ModelContextLengthError):
        await world.ask()
    assert world.client.called == ["a", "b"]


@pytest.mark.parametrize("model", ["b", None])
async def test_it_is_raised_where_no_window_is_longer(model: str | None) -> None:
    world = World(Client(b=[TOO_LONG]), attempts=9)
    with pytest.raises(ModelContextLengthError):
        await world.ask(model=model, preferred="b")
    assert world.client.called == ["b"]


# Streams


async def test_a_stream_is_passed_on_and_counted_at_its_end() -> None:
    raw = Stream(b"data: 1\n\n", b"data: 2\n\n", usage=Usage(10, 5, 4))
    world = World(Client(a=[raw]))
    stream = await world.stream()
    assert world.running() == 1
    assert [chunk async for chunk in stream] == [b"data: 1\n\n", b"data: 2\n\n"]
    await stream.aclose()
    await stream.aclose()
    assert raw.closed
    assert world.outcomes() == [("a", "answered")]
    assert [world.tokens(of) for of in ("input", "cached", "output")] == [6, 4, 5]
    assert world.running() == 0


async def test_without_usage_its_chunks_are_counted() -> None:
    world = World(Client(a=[Stream(b"data: 1\n\n", b"data: 2\n\n")]))
    prompt = {"messages": [{"role": "user", "content": "x" * 400}], "stream": True}
    _ = [chunk async for chunk in await world.stream(prompt)]
    assert world.tokens("output") == 2
    assert 100 <= world.tokens("input") < 120


async def test_a_stream_that_breaks_off_is_lost_and_says_so() -> None:
    world = World(Client(a=[Stream(b"data: {}\n\n", BROKEN)]))
    stream = await world.stream()
    assert await anext(stream) == b"data: {}\n\n"
    with pytest.raises(ModelUnavailableError, match="it broke"):
        await anext(stream)
    await stream.aclose()
    assert world.outcomes() == [("a", "lost")]
    assert world.tokens("output") == 1


async def test_a_reader_that_leaves_cancels_the_call() -> None:
    raw = Stream(b"data: 1\n\n", b"data: 2\n\n")
    world = World(Client(a=[raw]))
    stream = await world.stream()
    await anext(stream)
    await stream.aclose()
    assert raw.closed
    assert world.outcomes() == [("a", "cancelled")]
    assert world.tokens("output") == 1
    assert world.running() == 0


async def test_a_stream_falls_back_before_its_first_byte() -> None:
    world = World(Client(a=[BROKEN], b=[Stream(b"data: b\n\n")]))
    assert [chunk async for chunk in await world.stream()] == [b"data: b\n\n"]


# The cache


async def test_an_equal_call_is_answered_from_the_cache() -> None:
    world = World(Client(a=[answer()]), cached=True)
    first, second = await world.ask(COLD), await world.ask(COLD)
    assert (first.cached, second.cached) == (False, True)
    assert first.body == second.body == answer()
    assert (second.model, second.route.candidates) == ("a", ["a", "b"])
    assert world.outcomes() == [("a", "answered")]


async def test_equal_calls_at_the_same_time_make_one() -> None:
    go = asyncio.Event()
    world = World(Client(a=[(go, answer())]), cached=True)
    asking = [asyncio.create_task(world.ask(COLD)) for _ in range(50)]
    await settled()
    go.set()
    completions = await asyncio.gather(*asking)
    assert {completion.body for completion in completions} == {answer()}
    assert [completion.cached for completion in completions].count(False) == 1
    assert world.client.called == ["a"]


@pytest.mark.parametrize(
    ("body", "about"),
    [
        (HI, {}),
        ({**COLD, "stream": True}, {}),
        ({**COLD, "n": 2}, {}),
        ({**COLD, "tools": [{}]}, {}),
        (COLD, {"cache": False}),
    ],
)
async def test_what_may_not_be_kept_is_asked_each_time(
    body: dict[str, Any], about: dict[str, Any]
) -> None:
    world = World(Client(a=[answer(), answer()]), cached=True)
    for _ in range(2):
        assert not (await world.ask(body, **about)).cached
    assert world.client.called == ["a", "a"]


async def test_tenants_and_models_do_not_share_answers() -> None:
    world = World(Client(a=[answer("1"), answer("2")], b=[answer("3")]), cached=True)
    asked = [
        await world.ask(COLD, tenant="t"),
        await world.ask(COLD, tenant="u"),
        await world.ask(COLD, tenant="t", model="b"),
    ]
    assert [each.body for each in asked] == [answer("1"), answer("2"), answer("3")]


async def test_an_answer_of_another_model_is_shared_and_not_kept_as_the_firsts() -> None:
    go = asyncio.Event()
    world = World(Client(a=[(go, BROKEN), answer("a")], b=[answer("b")]), cached=True)
    asking = [asyncio.create_task(world.ask(COLD)) for _ in range(5)]
    await settled()
    go.set()
    completions = await asyncio.gather(*asking)
    assert {(each.model, each.body) for each in completions} == {("b", answer("b"))}
    assert world.client.called == ["a", "b"]
    assert (await world.ask(COLD)).body == answer("a")


async def test_an_answer_of_another_model_lets_other_hosts_call_at_once() -> None:
    world = World(Client(a=[BROKEN], b=[answer("b")]), cached=True)
    await world.ask(COLD)
    await settled()
    [(mark, until)] = world.answers.marks.values()
    assert (mark, until > 0.0) == ("alone", True)


async def test_who_waits_for_another_host_has_only_what_is_left_of_the_steps_time() -> None:
    world = World(Client(a=[answer()]), cached=True, step_timeout_s=30.0)
    key = completion_key("default", "a", COLD)
    world.answers.marks[key.digest] = ("another host", 60.0)
    asyncio.get_running_loop().call_later(0.05, world.answers.marks.clear)
    await world.ask(COLD)
    assert world.client.timeouts[0] <= 29.96


async def test_who_waits_for_another_host_leaves_in_time() -> None:
    world = World(Client(), cached=True, step_timeout_s=0.02)
    key = completion_key("default", "a", COLD)
    world.answers.marks[key.digest] = ("another host", 60.0)
    with pytest.raises(ModelUnavailableError, match="did not answer in time"):
        await world.ask(COLD)
    assert world.client.called == []


async def test_when_the_one_whose_call_it_was_leaves_another_is_told_that_it_is_his() -> None:
    go = asyncio.Event()
    world = World(Client(a=[(go, answer())]), cached=True)
    first, second = (asyncio.create_task(world.ask(COLD)) for _ in range(2))
    await settled()
    first.cancel()
    await asyncio.wait({first})
    go.set()
    assert not (await second).cached


async def test_who_is_held_out_asks_the_model_that_the_answer_is_kept_for() -> None:
    world = World(
        Client(a=[answer("a")] * 50, b=[answer("b")] * 50),
        cached=True,
        routing={"holdout": 0.5},
    )
    for _ in range(20):
        completion = await world.ask(COLD)
        assert completion.body == answer(completion.model)
    assert sorted(world.client.called) == ["a", "b"]


async def test_a_failure_is_nobodys_answer() -> None:
    refused = ModelError("bad request", status=400)
    world = World(Client(a=[refused, answer()]), cached=True)
    with pytest.raises(ModelError, match="bad request"):
        await world.ask(COLD)
    assert (await world.ask(COLD)).body == answer()
