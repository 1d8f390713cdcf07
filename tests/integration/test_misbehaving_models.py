"""Sessions whose models misbehave: real sockets, PostgreSQL and Redis, an owner without Ray."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from agentray.events import (
    ModelFailed,
    ModelFinished,
    TurnOptions,
)
from tests.followed_turn import script as sim
from tests.integration.misbehaving import (
    CLOSE,
    COMMENT,
    END,
    HANG,
    SSE,
    Steps,
    answer,
    error_body,
    event,
    in_turn,
    part,
    response,
    script,
    self_signed,
    speaking,
)
from tests.integration.scenes import BAD, ONE, PLAIN, Play, Scene
from tests.owners import TENANT, send
from tests.services import until


@dataclass(frozen=True)
class Fault:
    """What an endpoint says, the code of a turn that it ends, and what its message names."""

    steps: Steps
    says: str
    code: str = "model_unavailable"
    url: str | None = None
    tls: bool = False
    # What a turn waits for that has nowhere else to go ends with the step's time.
    waits: bool = False


BEFORE: dict[str, Fault] = {
    "hangs": Fault([HANG], "did not answer in time"),
    "hangs behind its head": Fault([SSE, HANG], "gave no token in time"),
    "only says that it is there": Fault(
        [SSE, *[COMMENT, 0.02] * 100, HANG], "gave no token in time"
    ),
    "closes at once": Fault([CLOSE], "broke off"),
    "closes behind its head": Fault([SSE, END], "closed the stream before the answer was whole"),
    "malformed SSE": Fault([SSE, part(b"<html>\n"), HANG], "malformed: a line is no event"),
    "events that are no JSON": Fault([SSE, part(b"data: {broken\n\n"), HANG], "is malformed"),
    "no JSON": Fault(response(200, b"hello"), "answered with application/json, not with a stream"),
    "a wrong content type": Fault(response(200, b"<html>", "text/html"), "text/html"),
    "an error as success": Fault(response(200, error_body(message="out of order")), "out of order"),
    "429": Fault(response(429, error_body(message="slow down")), "429", "model_rate_limited"),
    "429 for longer than the step": Fault(
        response(429, error_body(message="slow down"), retry_after="60"),
        "429",
        "model_rate_limited",
    ),
    "500": Fault(response(500, error_body(message="oh no")), "answered 500: oh no"),
    "a name that is not there": Fault(
        [], "cannot be reached", url="http://nobody.invalid/v1", waits=True
    ),
    "a certificate of its own": Fault([HANG], "certificate", tls=True, waits=True),
    "an empty answer": Fault(answer(), "gave an empty answer"),
}
AFTER: dict[str, Fault] = {
    "stalls": Fault([*ONE, HANG], "stalled"),
    "stalls, but is there": Fault([*ONE, *[COMMENT, 0.02] * 100, HANG], "stalled"),
    "closes early": Fault([*ONE, END], "closed the stream before the answer was whole"),
    "is cut off": Fault([*ONE, CLOSE], "broke off"),
    "turns malformed": Fault([*ONE, part(b"data: {broken\n\n"), HANG], "is malformed"),
    "an error in its stream": Fault(
        [*ONE, part(b"data: " + error_body(message="oops", code=500) + b"\n\n"), HANG], "500: oops"
    ),
}
FAULTS = BEFORE | AFTER


@asynccontextmanager
async def playing(fault: Fault, folder: Path) -> AsyncIterator[str]:
    """Have a fault play, and yield its URL."""
    if fault.url is not None:
        yield fault.url
        return
    tls = self_signed(folder) if fault.tls else None
    async with speaking(script(fault.steps), tls=tls) as endpoint:
        yield endpoint.url


# The fault table


@pytest.mark.parametrize("name", FAULTS)
async def test_a_fault_of_the_only_endpoint_ends_the_turn_and_not_the_session(
    name: str, play: Play, tmp_path: Path
) -> None:
    fault = FAULTS[name]
    async with playing(fault, tmp_path) as url, play(url) as scene:
        told = await scene.run("hello", BAD)
        assert told.end.error is not None
        late = fault.waits and told.end.error.code == "step_timeout"
        told.failed("step_timeout" if late else fault.code, fault.says)
        assert "'bad'" in told.end.error.message
        assert set(told.models) == {"bad"}
        assert {voided.reason for voided in told.voided} <= {fault.code}
        [failed] = told.events.of(ModelFailed)
        assert failed.error == told.end.error
        told.explained()
        shown = "one " if name in AFTER else ""
        assert {voided.text for voided in told.voided} | {failed.text} == {shown}
        assert told.items == [("incomplete", "one ")] * (len(told.called) if shown else 0)
        await scene.still_answers()


@pytest.mark.parametrize("name", BEFORE)
async def test_before_the_first_token_another_endpoint_answers_and_nobody_sees_it(
    name: str, play: Play, tmp_path: Path
) -> None:
    async with playing(FAULTS[name], tmp_path) as url, play(url) as scene:
        told = await scene.run(sim("well answered", tokens=1))
        assert (told.end.status, told.reader.text) == ("completed", "well answered")
        assert told.kinds == PLAIN
        assert told.items == [("completed", "well answered")]
        assert told.models == ["bad", "simulator"]
        [voided] = told.voided
        assert (voided.reason, voided.text, voided.continues) == (FAULTS[name].code, "", False)
        told.explained()
        first, second = told.called
        assert first.route is not None
        assert second.route is not None
        assert set(first.route.candidates) == {"bad", "simulator"}
        assert "prefers" in first.route.reason
        assert "failed this step" in second.route.reason or "unhealthy" in second.route.reason
        await scene.still_answers()


@pytest.mark.parametrize("name", AFTER)
async def test_behind_the_first_token_another_endpoint_begins_anew_and_the_stream_says_so(
    name: str, play: Play, tmp_path: Path
) -> None:
    async with playing(AFTER[name], tmp_path) as url, play(url) as scene:
        told = await scene.run(sim("well answered", tokens=1))
        assert (told.end.status, told.reader.text) == ("completed", "well answered")
        assert told.items == [("incomplete", "one "), ("completed", "well answered")]
        assert told.models == ["bad", "simulator"]
        [voided] = told.voided
        assert (voided.text, voided.continues) == ("one ", False)
        [fallback] = told.fallbacks
        assert (fallback.from_model, fallback.to_model) == ("bad", "simulator")
        assert (fallback.reason, fallback.continues) == (voided.reason, False)
        begun = [k for k, kind in enumerate(told.kinds) if kind == "response.output_item.added"]
        assert told.kinds[begun[1] - 1] == "agentray.model.fallback"
        told.explained()
        await scene.still_answers()


@pytest.mark.parametrize("name", AFTER)
async def test_behind_the_first_token_the_same_model_goes_on_without_a_seam(
    name: str, play: Play
) -> None:
    rest = answer("two ", "three")
    async with (
        speaking(in_turn(AFTER[name].steps, rest)) as endpoint,
        play(endpoint.url, bad={"continues_text": True}) as scene,
    ):
        told = await scene.run("hello")
        assert (told.end.status, told.reader.text) == ("completed", "one two three")
        assert told.items == [("completed", "one two three")]
        assert told.models == ["bad", "bad"]
        [voided] = told.voided
        assert (voided.text, voided.continues) == ("one ", True)
        assert told.called[1].continued_from == len("one ")
        [fallback] = told.fallbacks
        assert (fallback.from_model, fallback.to_model, fallback.continues) == ("bad", "bad", True)
        first, second = endpoint.bodies
        so_far = {"role": "assistant", "content": "one "}
        assert second["messages"] == [*first["messages"], so_far]
        assert second["continue_final_message"] is True
        assert second["add_generation_prompt"] is False
        told.explained()
        await scene.still_answers()


async def test_a_model_that_cannot_go_on_with_its_text_makes_way_for_another(play: Play) -> None:
    async with (
        speaking(in_turn([*ONE, CLOSE], [CLOSE])) as endpoint,
        play(endpoint.url, bad={"continues_text": True}) as scene,
    ):
        told = await scene.run(sim("well answered", tokens=1))
        assert told.end.status == "completed"
        assert told.models == ["bad", "bad", "simulator"]
        assert told.items == [("incomplete", "one "), ("completed", "well answered")]
        assert [fallback.continues for fallback in told.fallbacks] == [True, False]
        await scene.still_answers()


async def test_what_is_left_of_an_answers_limit_is_asked_of_a_model_that_goes_on(
    play: Play,
) -> None:
    said = "x" * 40
    steps: Steps = [SSE, event(said), 0.05, CLOSE]
    async with (
        speaking(in_turn(steps, answer("end"))) as endpoint,
        play(endpoint.url, bad={"continues_text": True}) as scene,
    ):
        told = await scene.run("hello", TurnOptions(max_output_tokens=30))
        assert told.end.status == "completed"
        assert [body["max_completion_tokens"] for body in endpoint.bodies] == [30, 20]


async def test_an_answer_that_is_longer_than_asked_is_cut_and_says_so(play: Play) -> None:
    steps: Steps = [SSE, *[event("x" * 100)] * 500, HANG]
    async with speaking(script(steps)) as endpoint, play(endpoint.url) as scene:
        told = await scene.run("hello", TurnOptions(model="bad", max_output_tokens=5))
        assert told.end.status == "incomplete"
        assert told.end.error is not None
        assert told.end.error.code == "max_output_tokens"
        assert told.response.incomplete_details is not None
        assert told.response.incomplete_details.reason == "max_output_tokens"
        [(status, text)] = told.items
        assert status == "incomplete"
        assert 100 <= len(text) < 2_000
        await scene.still_answers()


# Breakers, limits and bounds


async def test_a_model_that_fails_is_left_alone_until_one_probe_finds_it_back(play: Play) -> None:
    bad = [response(500, b"oh no")] * 3
    slow: Steps = [SSE, 0.4, event("back"), event("", "stop"), END]
    async with (
        speaking(in_turn(*bad, slow)) as endpoint,
        play(endpoint.url, breaker={"min_calls": 3, "open_s": 2.0}, step_timeout_s=1.5) as scene,
    ):
        (await scene.run("one", BAD)).failed("model_unavailable", "answered 500")
        assert len(endpoint.requests) == 3
        refused = await scene.run("two", BAD)
        refused.failed("model_unavailable", "is left alone")
        assert refused.end.error is not None
        assert "answered 500" in refused.end.error.message
        assert not scene.owner.router.health()["bad"].healthy
        # Who may go elsewhere does not even try.
        told = await scene.run(sim("well answered", tokens=1))
        assert (told.models, told.end.status) == (["simulator"], "completed")
        assert len(endpoint.requests) == 3

        async def may_be_probed() -> bool:
            return scene.owner.router.wait_s("bad") == 0

        await until(may_be_probed, "the breaker lets a probe through")
        others = [Scene(scene.owners, scene.owner) for _ in range(3)]
        for other in others:
            await other.owner.sessions.create(TENANT, session_id=other.session)
        turns = [await send(o.owner, o.session, "three", options=BAD) for o in others]
        ends = [
            await other.owner.sessions.wait(TENANT, other.session, turn.id)
            for other, turn in zip(others, turns, strict=True)
        ]
        assert sorted(end.status or "" for end in ends) == ["completed", "failed", "failed"]
        assert len(endpoint.requests) == 4
        assert scene.owner.router.health()["bad"].healthy
        assert (await scene.run("four", BAD)).reader.text == "back"
        scene.journal().assert_sound()


async def test_a_limit_keeps_calls_away_until_its_time_and_is_no_fault(play: Play) -> None:
    limited = response(429, b"{}", retry_after="2")
    async with (
        speaking(in_turn(limited, answer("here again"))) as endpoint,
        play(endpoint.url) as scene,
    ):
        for _ in range(3):
            told = await scene.run(sim("well answered", tokens=1))
            assert (told.end.status, told.kinds) == ("completed", PLAIN)
        assert told.models == ["simulator"]
        assert len(endpoint.requests) == 1
        assert scene.owner.router.health()["bad"].healthy

        async def is_over() -> bool:
            return scene.owner.router.wait_s("bad") == 0

        await until(is_over, "the limit is over")
        assert (await scene.run("hello")).reader.text == "here again"
        scene.journal().assert_sound()


async def test_who_has_nowhere_else_to_go_waits_as_long_as_it_is_told(play: Play) -> None:
    limited = response(429, b"{}", retry_after="1")
    async with (
        speaking(in_turn(limited, answer("here again"))) as endpoint,
        play(endpoint.url) as scene,
    ):
        told = await scene.run("hello", BAD)
        assert told.reader.text == "here again"
        [first, second] = told.called
        assert second.at - first.at + 0.3 >= 1.0
        assert len(endpoint.requests) == 2


@pytest.mark.parametrize("steps", [[HANG], [*ONE, HANG]], ids=["before", "behind"])
async def test_all_attempts_together_have_the_time_of_one_step(steps: Steps, play: Play) -> None:
    async with (
        speaking(script(steps)) as endpoint,
        play(endpoint.url, attempts=50, step_timeout_s=1.5) as scene,
    ):
        told = await scene.run("hello", BAD)
        told.failed("step_timeout", "the step's 1.5 s are over; last: model 'bad'")
        assert 2 <= len(endpoint.requests) < 10
        assert told.end.at - told.called[0].at < 2.5
        await scene.still_answers()


async def test_all_attempts_together_cost_no_more_than_a_step_may(play: Play) -> None:
    # A dollar a token, and each attempt says ten tokens before it breaks off.
    steps: Steps = [SSE, event("x" * 40), 0.05, CLOSE]
    async with (
        speaking(script(steps)) as endpoint,
        play(
            endpoint.url,
            bad={"card": {"price": {"output": 1e6}}},
            attempts=50,
            routing={"step_cost_cap": 25.0},
        ) as scene,
    ):
        told = await scene.run("hello", BAD)
        told.failed("step_cost_cap", "the step's 25 dollars are spent; last: model 'bad'")
        assert len(endpoint.requests) == 3
        assert told.end.cost == pytest.approx(30.0)
        await scene.still_answers()


async def test_a_session_that_has_spent_its_budget_goes_on_with_the_cheapest_model(
    play: Play,
) -> None:
    # A dollar a token, ten tokens an answer: the second one takes it over four fifths.
    steps = answer("x" * 40, usage={"prompt_tokens": 5, "completion_tokens": 10})
    async with (
        speaking(script(steps)) as endpoint,
        play(
            endpoint.url,
            bad={"card": {"price": {"output": 1e6}}},
            routing={"session_budget": 25.0},
        ) as scene,
    ):
        told = [await scene.run(sim("well", tokens=1)) for _ in range(3)]
        assert [turn.models for turn in told] == [["bad"], ["bad"], ["simulator"]]
        assert [turn.end.cost for turn in told] == [10.0, 10.0, 0.0]
        [called] = told[2].called
        assert called.route is not None
        assert "budget is nearly spent" in called.route.reason
        # Who asks for it by its name still gets it.
        assert (await scene.run("hello", BAD)).models == ["bad"]
        await scene.still_answers()


async def test_a_slow_first_token_is_hedged_and_the_stream_is_one(play: Play) -> None:
    async with (
        speaking(script([SSE, HANG])) as endpoint,
        play(endpoint.url, routing={"hedge_after_s": 0.1}, first_token_timeout_s=10.0) as scene,
    ):
        told = await scene.run(sim("well answered", tokens=1))
        assert (told.end.status, told.kinds) == ("completed", PLAIN)
        assert told.items == [("completed", "well answered")]
        [called] = told.called
        assert called.model == "bad"
        assert called.route is not None
        assert called.route.hedge == "simulator"
        [finished] = told.events.of(ModelFinished)
        assert finished.model == "simulator"
        assert len(endpoint.requests) == 1
        outcomes = {
            model: scene.count("agentray_model_calls_total", model=model, outcome=outcome)
            for model, outcome in (("bad", "cancelled"), ("simulator", "answered"))
        }
        assert outcomes == {"bad": 1, "simulator": 1}
        await scene.still_answers()
