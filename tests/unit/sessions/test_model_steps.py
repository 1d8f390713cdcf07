"""The model calls of a turn: which model, what of it is shown, and what comes behind a failure."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from typing import Any, cast

import pytest
from msgspec.structs import replace

from agentray.agents.spec import Agents
from agentray.clock import ManualClock
from agentray.config.settings import AgentSettings, ModelsSettings
from agentray.errors import (
    ModelContextLengthError,
    ModelError,
    ModelRateLimitedError,
    ModelUnavailableError,
)
from agentray.events import (
    AnyEvent,
    Message,
    ModelCalled,
    ModelFailed,
    ModelFinished,
    ModelVoided,
    ToolCall,
    TurnAccepted,
    TurnOptions,
)
from agentray.models.calls import ModelCalls
from agentray.models.catalog import Catalog
from agentray.models.router import Router
from agentray.sessions.model_steps import ModelSteps
from agentray.sessions.state import (
    CANCELLED,
    CallModel,
    CallTools,
    Command,
    EndTurn,
    RecoverModel,
    Rules,
    RunModel,
    SessionState,
)
from agentray.sessions.stream import Hub, TailWriter
from agentray.storage.base import Wire
from agentray.telemetry.metrics import Metrics
from agentray.tools.spec import Toolbox, ToolContext, ToolSpec
from tests.unit.models.played import PlayedModels, said, whole
from tests.unit.models.test_cache import settled
from tests.unit.sessions.fence import actor_of

BROKEN = ModelUnavailableError("it broke")
EMPTY = ModelUnavailableError("nothing", empty=True)
TOO_LONG = ModelContextLengthError("too long", status=400)
GOOD = ToolCall("c", "echo", '{"text":"x"}')
BAD = ToolCall("c", "echo", '{"txt":1}')
NUMBER: dict[str, Any] = {"type": "object", "properties": {"n": {"type": "integer"}}}
PRICE = {"input": 1.0, "output": 4.0}
DOLLARS = 3.0
RULES = Rules(model_attempts=3, step_timeout_s=60.0)


class Calm(random.Random):
    """Chance that waits for nothing and holds nothing out; it counts the waits."""

    waits = 0

    def uniform(self, a: float, b: float) -> float:
        self.waits += 1
        return 0.0

    def random(self) -> float:
        return 1.0


class WorkingWire:
    """A wire that takes everything."""

    available = True

    async def write_tails(self, tails: list[tuple[str, int, bytes]]) -> bool:
        return True

    async def publish(self, messages: Any) -> None:
        pass


async def echo(arguments: dict[str, Any], context: ToolContext) -> str:
    return arguments["text"]


ECHO = ToolSpec(
    "echo",
    "Says it again.",
    {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
    echo,
)


class World:
    """A session of one agent over the models of ``cards``; ``large`` is of the large tier."""

    def __init__(
        self,
        *,
        cards: dict[str, Any] | None = None,
        continues: bool = False,
        rules: Rules = RULES,
        state: SessionState | None = None,
        agent: dict[str, Any] | None = None,
        **scripts: list[list[Any]],
    ) -> None:
        cards = cards or {"small": {"tier": "small"}, "large": {"tier": "large"}}
        self.settings = ModelsSettings.model_validate(
            {
                "endpoints": {
                    name: {
                        "url": "http://h/v1",
                        "continues_text": continues,
                        "card": {"price": PRICE, **card},
                    }
                    for name, card in cards.items()
                }
            }
        )
        self.models = PlayedModels(**scripts)
        self.clock = ManualClock()
        self.metrics = Metrics()
        self.chance = Calm()
        self.router = Router(
            Catalog(self.settings, ""),
            self.settings,
            clock=self.clock,
            metrics=self.metrics,
            rng=self.chance,
        )
        self.wire = WorkingWire()
        self.actor = actor_of(1, 0, state or SessionState(), rules)
        self.hub = self.actor.hub = Hub(self.actor.state.seq)
        self.hub.local = True
        self.journal: list[AnyEvent] = []
        self.shown: list[str] = []
        self.steps = ModelSteps(
            router=self.router,
            models=ModelCalls(self.router, self.models, self.settings),
            agents=Agents({"assistant": AgentSettings.model_validate(agent or {})}),
            tools=Toolbox([ECHO]),
            tails=TailWriter(cast("Wire", self.wire), self._confirm),
            clock=self.clock,
            metrics=self.metrics,
            flush=self.flush,
        )

    async def _confirm(self) -> None:
        pass

    async def flush(self, actor: Any) -> None:
        _, events = actor.take_append()
        self.journal += events
        self.hub.feed(events)

    def accept(self, text: str = "hi", **options: Any) -> tuple[Command, ...]:
        actor = self.actor
        return actor.record(
            TurnAccepted(
                seq=actor.state.seq + 1,
                turn_id="turn1",
                at=self.clock.now(),
                input=[Message("user", text)],
                agent="assistant",
                options=TurnOptions(**options),
            )
        )

    async def ask(self, text: str = "hi", **options: Any) -> Command:
        """Run a turn to its end, or to the tools that it asks for."""
        return await self.carry_out(self.accept(text, **options))

    async def carry_out(self, commands: tuple[Command, ...]) -> Command:
        async with asyncio.timeout(10):
            while True:
                [command] = commands
                if isinstance(command, CallModel):
                    commands = self.steps.record_call(self.actor, command)
                    if self.actor.recorded:
                        await self.flush(self.actor)
                elif isinstance(command, RunModel):
                    commands = await self.steps.run(self.actor)
                elif isinstance(command, RecoverModel):
                    commands = self.steps.recover(self.actor, command)
                else:
                    if self.actor.recorded:
                        await self.flush(self.actor)
                    return command

    def told(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.journal if isinstance(event, kind)]

    @property
    def called(self) -> list[ModelCalled]:
        return self.told(ModelCalled)

    @property
    def escalations(self) -> float:
        labels = {"model": "small"}
        return self.metrics.registry.get_sample_value("agentray_escalations_total", labels) or 0.0

    def messages(self, call: int) -> list[Any]:
        """Return the messages that a call was made with."""
        return json.loads(b"[" + self.models.requests[call].messages + b"]")

    def sees(self) -> Callable[[], None]:
        """Return what takes down, when it is played, how much text of the call is to be seen."""
        return lambda: self.shown.append(self.hub.text)


# Picking


async def test_the_model_that_is_picked_is_journaled_with_its_route() -> None:
    world = World(small=[[said("Hel"), whole("lo")]])
    assert await world.ask() == EndTurn("completed")
    [called] = world.called
    assert (called.model, called.step, called.attempt) == ("small", 1, 1)
    assert called.route is not None
    assert (called.route.kind, called.route.candidates) == ("plan", ["small", "large"])
    assert called.route.reason.startswith("small for plan of difficulty 0.4")
    [finished] = world.told(ModelFinished)
    assert (finished.text, finished.cost, finished.model) == ("Hello", DOLLARS, None)
    assert world.actor.turn.cost == DOLLARS


async def test_the_call_is_told_what_the_turn_and_its_agent_say() -> None:
    world = World(
        small=[[whole("x")]],
        agent={"temperature": 0.5, "max_output_tokens": 9, "cache": True, "instructions": "Be."},
    )
    await world.ask(temperature=0.0, top_p=0.9)
    [request] = world.models.requests
    assert (request.temperature, request.top_p, request.max_output_tokens) == (0.0, 0.9, 9)
    assert (request.session_id, request.tenant, request.cache) == ("s", "t", True)
    assert request.timeout_s == pytest.approx(60.0, abs=1.0)
    assert not request.continue_text
    assert request.route == world.called[0].route
    assert request.output_schema is None
    assert b'"echo"' in (request.tools or b"")
    assert [message["content"] for message in world.messages(0)] == ["Be.", "hi"]


@pytest.mark.parametrize(
    ("cards", "patient"),
    [({"small": {"tier": "small"}}, True), (None, False)],
    ids=["alone", "with another"],
)
async def test_only_who_has_nowhere_else_to_go_is_patient(cards: Any, patient: bool) -> None:
    world = World(cards=cards, small=[[whole("x")]])
    await world.ask()
    assert world.models.requests[0].patient is patient


async def test_a_forced_model_is_called_and_an_unknown_one_ends_the_turn() -> None:
    world = World(large=[[whole("x")]])
    assert await world.ask(model="large") == EndTurn("completed")
    end = await World().ask(model="none")
    assert isinstance(end, EndTurn)
    assert end.status == "failed"
    assert end.error is not None
    assert end.error.code == "model_not_found"


async def test_without_a_model_the_turn_says_why() -> None:
    world = World(cards={"small": {"tier": "small", "tools": False}})
    end = await world.ask()
    assert isinstance(end, EndTurn)
    assert end.error is not None
    assert (end.error.code, end.status) == ("no_model", "failed")
    assert "small: it cannot ask for tools" in end.error.message
    assert world.models.called == []


# Checks and escalation


async def test_tool_calls_that_fit_are_called() -> None:
    world = World(small=[[whole("", "tool_calls", GOOD)]])
    assert await world.ask() == CallTools(((GOOD, 1),))
    assert world.escalations == 0


@pytest.mark.parametrize(
    "bad",
    [
        BAD,
        ToolCall("c", "echo", "{text"),
        ToolCall("c", "echo", '["x"]'),
        ToolCall("c", "none", "{}"),
    ],
)
async def test_a_tool_call_that_does_not_fit_goes_to_the_next_tier_before_it_runs(
    bad: ToolCall,
) -> None:
    world = World(
        small=[[said("let me "), whole("see", "tool_calls", bad)]],
        large=[[whole("", "tool_calls", GOOD)]],
    )
    assert await world.ask() == CallTools(((GOOD, 1),))
    [voided] = world.told(ModelVoided)
    assert (voided.escalates, voided.continues, voided.text) == (True, False, "let me see")
    assert voided.cost == DOLLARS
    assert [called.model for called in world.called] == ["small", "large"]
    assert world.called[1].route is not None
    assert world.called[1].route.reason == "escalated"
    assert world.called[1].continued_from == 0
    assert world.escalations == 1
    assert world.actor.turn.cost == 2 * DOLLARS


async def test_an_agent_that_prefers_the_small_model_escalates_as_well() -> None:
    world = World(
        small=[[whole("", "tool_calls", BAD)]],
        large=[[whole("fine")]],
        agent={"model": "small"},
    )
    assert await world.ask() == EndTurn("completed")


async def test_a_step_escalates_once_and_then_its_problem_is_the_models_to_mend() -> None:
    world = World(small=[[whole("", "tool_calls", BAD)]], large=[[whole("", "tool_calls", BAD)]])
    # Whoever runs it answers with the problem: nothing of it is run.
    assert await world.ask() == CallTools(((BAD, 1),))
    assert len(world.told(ModelVoided)) == 1


@pytest.mark.parametrize("again", [whole("", "tool_calls", BAD), EMPTY])
async def test_a_step_that_came_back_from_the_next_tier_does_not_go_there_again(
    again: Any,
) -> None:
    world = World(
        small=[[whole("", "tool_calls", BAD)], [again], [again]], large=[[BROKEN], [whole("x")]]
    )
    await world.ask()
    assert [voided.escalates for voided in world.told(ModelVoided)].count(True) == 1
    assert world.escalations == 1


@pytest.mark.parametrize(
    "about", [{"cards": {"small": {"tier": "small"}}}, {"agent": {"models": ["small"]}}]
)
async def test_without_a_next_tier_a_bad_call_goes_on_to_its_problem(about: Any) -> None:
    world = World(small=[[whole("", "tool_calls", BAD)]], **about)
    assert await world.ask() == CallTools(((BAD, 1),))
    assert world.told(ModelVoided) == []


async def test_a_forced_model_is_not_left_for_a_better_one() -> None:
    world = World(small=[[whole("", "tool_calls", BAD)]])
    assert await world.ask(model="small") == CallTools(((BAD, 1),))


async def test_calls_with_the_same_id_are_told_apart() -> None:
    world = World(small=[[whole("", "tool_calls", GOOD, GOOD, GOOD)]])
    command = await world.ask()
    assert isinstance(command, CallTools)
    assert [call.call_id for call, _ in command.calls] == ["c", "c_2", "c_3"]


async def test_text_streams_at_once_although_tools_are_offered() -> None:
    world = World()
    world.models.scripts["small"] = [[said("Hel"), world.sees(), whole("lo")]]
    await world.ask()
    assert world.shown == ["Hel"]


async def test_an_answer_in_a_form_is_held_back_until_it_was_checked() -> None:
    world = World()
    world.models.scripts["small"] = [[said('{"n":'), world.sees(), whole("1}")]]
    assert await world.ask(output_schema=NUMBER) == EndTurn("completed")
    assert world.shown == [""]
    [finished] = world.told(ModelFinished)
    assert finished.text == '{"n":1}'
    [request] = world.models.requests
    form = json.loads(request.output_schema or b"")
    assert form["json_schema"] == {"name": "answer", "schema": NUMBER}


async def test_what_the_caller_says_of_the_form_is_passed_on() -> None:
    world = World(small=[[whole('{"n":1}')]])
    await world.ask(output_schema=NUMBER, output_form={"name": "n", "strict": True})
    form = json.loads(world.models.requests[0].output_schema or b"")
    assert form["json_schema"] == {"name": "n", "strict": True, "schema": NUMBER}


@pytest.mark.parametrize(
    ("reason", "code"), [("length", "max_output_tokens"), ("content_filter", "content_filter")]
)
async def test_an_answer_in_a_form_that_was_cut_ends_incomplete_with_its_text(
    reason: str, code: str
) -> None:
    world = World(small=[[said('{"n":'), whole("1", reason)]])
    end = await world.ask(output_schema=NUMBER)
    assert isinstance(end, EndTurn)
    assert end.error is not None
    assert (end.status, end.error.code) == ("incomplete", code)
    [finished] = world.told(ModelFinished)
    assert finished.text == '{"n":1'


async def test_what_was_said_to_a_bad_call_is_kept_with_it_also_where_a_form_is_asked() -> None:
    world = World(
        cards={"small": {"tier": "small"}},
        small=[[said("let me "), whole("see", "tool_calls", BAD)]],
    )
    assert await world.ask(output_schema=NUMBER) == CallTools(((BAD, 1),))
    [finished] = world.told(ModelFinished)
    assert finished.text == "let me see"


async def test_a_model_without_schemas_is_asked_without_one_and_checked_all_the_same() -> None:
    card = {"tier": "small", "output_schema": False}
    world = World(cards={"small": card}, small=[[whole("no number")]])
    end = await world.ask(output_schema=NUMBER)
    assert isinstance(end, EndTurn)
    assert end.error is not None
    assert end.error.code == "output_invalid"
    assert world.models.requests[0].output_schema is None


async def test_an_answer_in_the_wrong_form_escalates_and_none_of_it_was_ever_shown() -> None:
    world = World(small=[[said('{"n":'), whole('"x"}')]], large=[[whole('{"n":2}')]])
    assert await world.ask(output_schema=NUMBER) == EndTurn("completed")
    [voided] = world.told(ModelVoided)
    assert (voided.escalates, voided.text) == (True, "")
    [finished] = world.told(ModelFinished)
    assert finished.text == '{"n":2}'
    assert world.escalations == 1


async def test_a_form_that_no_tier_meets_fails_the_turn() -> None:
    world = World(small=[[whole("one")]], large=[[whole('{"n":"two"}')]])
    end = await world.ask(output_schema=NUMBER)
    assert isinstance(end, EndTurn)
    assert end.status == "failed"
    assert end.error is not None
    assert end.error.code == "output_invalid"
    assert end.error.message == "model 'large': the answer: n: 'two' is not of type 'integer'"
    [failed] = world.told(ModelFailed)
    assert (failed.text, failed.cost) == ("", DOLLARS)
    assert world.models.called == ["small", "large"]


async def test_an_empty_answer_escalates_and_is_never_an_answer() -> None:
    world = World(small=[[EMPTY]], large=[[whole("full")]])
    assert await world.ask() == EndTurn("completed")
    [voided] = world.told(ModelVoided)
    assert (voided.escalates, voided.reason) == (True, "model_unavailable")
    assert world.escalations == 1


async def test_empty_answers_without_a_next_tier_fail_in_the_end() -> None:
    world = World(cards={"small": {"tier": "small"}}, small=[[EMPTY]] * 3)
    end = await world.ask()
    assert isinstance(end, EndTurn)
    assert end.status == "failed"
    assert world.told(ModelFinished) == []
    assert world.models.called == ["small"] * 3


# What fails before the first token


@pytest.mark.parametrize(
    "error",
    [BROKEN, ModelRateLimitedError("slow down"), ModelError("bad key", status=401)],
)
async def test_what_fails_before_its_first_token_goes_to_the_next_model_at_once(
    error: ModelError,
) -> None:
    world = World(small=[[error]], large=[[whole("here")]])
    assert await world.ask() == EndTurn("completed")
    [voided] = world.told(ModelVoided)
    assert (voided.text, voided.continues, voided.escalates) == ("", False, False)
    assert [called.model for called in world.called] == ["small", "large"]
    assert world.chance.waits == 0
    errors = {"code": error.code}
    assert world.metrics.registry.get_sample_value("agentray_model_errors_total", errors) == 1


async def test_the_only_model_is_asked_again_after_a_while() -> None:
    world = World(cards={"small": {"tier": "small"}}, small=[[BROKEN], [BROKEN], [whole("x")]])
    assert await world.ask() == EndTurn("completed")
    assert world.models.called == ["small"] * 3
    assert world.chance.waits > 0


async def test_when_all_have_failed_the_next_attempt_waits() -> None:
    world = World(small=[[BROKEN], [whole("x")]], large=[[BROKEN]])
    assert await world.ask() == EndTurn("completed")
    assert world.models.called == ["small", "large", "small"]
    assert world.chance.waits > 0


async def test_a_step_ends_with_its_attempts_and_its_last_error() -> None:
    last = ModelUnavailableError("the last one")
    world = World(small=[[BROKEN], [last]], large=[[BROKEN]])
    end = await world.ask()
    assert isinstance(end, EndTurn)
    assert end.error is not None
    assert (end.status, end.error.message) == ("failed", "the last one")
    assert len(world.called) == 3


async def test_what_no_model_answers_ends_the_turn_at_once() -> None:
    world = World(small=[[ModelError("bad request", status=400)]])
    end = await world.ask()
    assert isinstance(end, EndTurn)
    assert end.error is not None
    assert (end.error.code, end.error.message) == ("model_error", "bad request")
    assert world.models.called == ["small"]


# What fails behind its first token


async def test_a_model_that_goes_on_is_asked_to_although_another_one_is_there() -> None:
    world = World(continues=True, small=[[said("half "), BROKEN], [whole("done")]])
    assert await world.ask() == EndTurn("completed")
    [voided] = world.told(ModelVoided)
    assert (voided.text, voided.continues) == ("half ", True)
    assert voided.cost > 0
    again = world.called[1]
    assert (again.model, again.continued_from) == ("small", 5)
    assert again.route is not None
    assert again.route.reason == "goes on with its own text"
    assert world.models.requests[1].continue_text
    assert world.messages(1)[-1] == {"role": "assistant", "content": "half "}
    [finished] = world.told(ModelFinished)
    assert finished.text == "half done"


async def test_one_that_does_not_even_begin_again_makes_way_and_nothing_is_spliced() -> None:
    world = World(
        continues=True, small=[[said("half "), BROKEN], [BROKEN]], large=[[whole("all of it")]]
    )
    assert await world.ask() == EndTurn("completed")
    first, second = world.told(ModelVoided)
    assert (first.continues, second.continues) == (True, False)
    assert second.text == "half "
    assert [called.continued_from for called in world.called] == [0, 5, 0]
    assert world.models.called == ["small", "small", "large"]
    assert not world.models.requests[2].continue_text
    assert [message["role"] for message in world.messages(2)] == ["system", "user"]
    [finished] = world.told(ModelFinished)
    assert finished.text == "all of it"


async def test_one_that_goes_on_and_breaks_again_goes_on_again() -> None:
    world = World(
        continues=True,
        small=[[said("a"), BROKEN], [said("b"), BROKEN], [whole("c")]],
    )
    assert await world.ask() == EndTurn("completed")
    assert [called.continued_from for called in world.called] == [0, 1, 2]
    assert world.told(ModelFinished)[0].text == "abc"


async def test_a_text_that_its_model_cannot_continue_begins_anew_elsewhere() -> None:
    world = World(small=[[said("half "), BROKEN]], large=[[whole("all of it")]])
    assert await world.ask() == EndTurn("completed")
    [voided] = world.told(ModelVoided)
    assert (voided.text, voided.continues) == ("half ", False)
    assert world.models.called == ["small", "large"]
    assert world.told(ModelFinished)[0].text == "all of it"


async def test_a_text_is_gone_on_with_where_there_is_no_other_model() -> None:
    world = World(
        cards={"small": {"tier": "small"}},
        continues=True,
        small=[[said("a"), BROKEN], [BROKEN], [whole("b")]],
    )
    assert await world.ask() == EndTurn("completed")
    assert world.told(ModelFinished)[0].text == "ab"


async def test_the_end_of_a_text_may_be_all_that_was_missing() -> None:
    world = World(continues=True, small=[[said("all"), BROKEN], [whole("")]])
    assert await world.ask() == EndTurn("completed")
    assert world.told(ModelFinished)[0].text == "all"


async def test_text_that_is_continued_is_checked_as_a_whole_and_counts_against_its_limit() -> None:
    world = World(continues=True, small=[[said("x" * 40), BROKEN], [whole("y")]])
    await world.ask(max_output_tokens=50)
    assert [request.max_output_tokens for request in world.models.requests] == [50, 40]


# Another model than the one that was asked for


async def test_a_hedge_that_answers_is_the_turns_model() -> None:
    world = World(small=[[replace(whole("x"), model="large")]])
    await world.ask()
    [finished] = world.told(ModelFinished)
    assert finished.model == "large"
    assert world.actor.turn.model == "large"


async def test_a_hedge_that_breaks_off_goes_on_itself() -> None:
    broken = ModelUnavailableError("it broke", answering="large")
    world = World(continues=True, small=[[said("half "), broken]], large=[[whole("done")]])
    assert await world.ask() == EndTurn("completed")
    [voided] = world.told(ModelVoided)
    assert (voided.model, voided.continues) == ("large", True)
    assert [called.model for called in world.called] == ["small", "large"]
    assert world.called[1].continued_from == 5


# A context that is too long

PAST = SessionState(window=tuple(b'{"role":"user","content":"%d"}' % n for n in range(4)))


async def test_a_prompt_that_is_too_long_goes_whole_to_a_longer_window() -> None:
    cards = {
        "small": {"tier": "small", "context_window": 1_000},
        "other": {"tier": "small", "context_window": 900},
        "large": {"tier": "large", "context_window": 9_000},
    }
    world = World(
        cards=cards,
        state=PAST,
        small=[[TOO_LONG]],
        large=[[whole("fits")]],
        agent={"model": "small"},
    )
    assert await world.ask() == EndTurn("completed")
    [voided] = world.told(ModelVoided)
    assert (voided.reason, voided.text) == ("context_length_exceeded", "")
    assert world.models.called == ["small", "large"]
    assert world.messages(1) == world.messages(0)
    assert world.chance.waits == 0


async def test_without_a_longer_one_the_younger_half_of_the_past_is_shown() -> None:
    cards = {
        "small": {"tier": "small", "context_window": 900},
        "large": {"tier": "large", "context_window": 1_000},
    }
    world = World(
        cards=cards, state=PAST, large=[[TOO_LONG], [whole("fits")]], agent={"model": "large"}
    )
    assert await world.ask() == EndTurn("completed")
    assert world.models.called == ["large", "large"]
    contents = [message["content"] for message in world.messages(1)]
    assert contents[1:] == ["2", "3", "hi"]
    assert [message["content"] for message in world.messages(0)][1:3] == ["0", "1"]


async def test_the_only_model_is_shown_less_at_once() -> None:
    cards = {"small": {"tier": "small"}}
    world = World(cards=cards, state=PAST, small=[[TOO_LONG], [whole("fits")]])
    assert await world.ask() == EndTurn("completed")
    assert len(world.messages(1)) == len(world.messages(0)) - 2
    assert world.chance.waits == 0


async def test_a_prompt_that_is_still_too_long_ends_the_turn() -> None:
    world = World(small=[[TOO_LONG]], large=[[TOO_LONG]], state=PAST)
    end = await world.ask()
    assert isinstance(end, EndTurn)
    assert end.error is not None
    assert end.error.code == "context_length_exceeded"
    assert world.models.called == ["small", "large"]


# Time and money


async def test_a_step_ends_with_its_time() -> None:
    world = World()
    late = ModelUnavailableError("did not finish in time")
    world.models.scripts["small"] = [[lambda: world.clock.advance(61), late]]
    end = await world.ask()
    assert isinstance(end, EndTurn)
    assert end.error is not None
    assert (end.status, end.error.code) == ("failed", "step_timeout")
    assert world.models.called == ["small"]


async def test_what_an_attempt_took_the_next_one_has_not() -> None:
    world = World(large=[[whole("x")]])
    world.models.scripts["small"] = [[lambda: world.clock.advance(20), BROKEN]]
    await world.ask()
    left_s = [request.timeout_s for request in world.models.requests]
    assert left_s == pytest.approx([60.0, 40.0], abs=1.0)


async def test_a_step_ends_when_it_has_cost_what_it_may() -> None:
    rules = replace(RULES, step_cost_cap=0.001)
    world = World(rules=rules, small=[[said("x" * 4_000), BROKEN]])
    end = await world.ask()
    assert isinstance(end, EndTurn)
    assert end.error is not None
    assert end.error.code == "step_cost_cap"
    assert world.models.called == ["small"]
    assert world.actor.turn.cost > 0.001


async def test_a_model_that_would_cost_too_much_is_not_called() -> None:
    cards = {"small": {"tier": "small", "price": {"input": 1e9}}, "large": {}}
    world = World(cards=cards, rules=replace(RULES, step_cost_cap=1.0), large=[[whole("x")]])
    assert await world.ask() == EndTurn("completed")
    assert world.models.called == ["large"]


# Cancelling


async def test_a_call_is_cancelled_in_the_middle_and_its_text_is_kept() -> None:
    begun = asyncio.Event()
    world = World(small=[[said("half "), begun.set, asyncio.Event()]])
    asking = asyncio.create_task(world.ask())
    await begun.wait()
    assert world.actor.cancel("turn1")
    assert await asking == CANCELLED
    [voided] = world.told(ModelVoided)
    assert (voided.reason, voided.text, voided.continues) == ("cancelled", "half ", False)
    assert world.models.closed == ["small"]


async def test_what_a_cancelled_call_cost_is_in_the_journal() -> None:
    begun = asyncio.Event()
    world = World(small=[[said("x" * 4_000), begun.set, asyncio.Event()]])
    asking = asyncio.create_task(world.ask())
    await begun.wait()
    world.actor.cancel("turn1")
    await asking
    [voided] = world.told(ModelVoided)
    # A thousand tokens, and what was asked.
    assert 1_000 * 4 / 1e6 <= voided.cost < 1_100 * 4 / 1e6
    assert world.actor.turn.cost == voided.cost


async def test_what_a_call_cost_that_fails_just_as_it_is_cancelled_is_there_as_well() -> None:
    world = World()
    failed = ModelUnavailableError("it broke")
    world.models.scripts["small"] = [
        [said("x" * 4_000), lambda: setattr(world.actor, "cancel_requested", True), failed]
    ]
    assert await world.ask() == CANCELLED
    [voided] = world.told(ModelVoided)
    assert voided.cost == failed.fields["cost"] > 0


async def test_a_call_that_had_said_nothing_leaves_nothing() -> None:
    waiting = asyncio.Event()
    world = World(small=[[waiting.set, asyncio.Event()]])
    asking = asyncio.create_task(world.ask())
    await waiting.wait()
    world.actor.cancel("turn1")
    assert await asking == CANCELLED
    assert world.told(ModelVoided) == []


async def test_a_turn_that_was_cancelled_before_its_call_makes_none() -> None:
    world = World()
    commands = world.accept()
    world.actor.cancel("turn1")
    assert await world.carry_out(commands) == CANCELLED
    assert world.models.called == []


async def test_the_wait_before_another_attempt_is_cancelled_as_well() -> None:
    failed = asyncio.Event()
    slow = ModelRateLimitedError("slow down", retry_after_s=50.0)
    world = World(cards={"small": {"tier": "small"}}, small=[[failed.set, slow]])
    world.router.backoff_s = lambda failures, error: 50.0  # type: ignore[method-assign]
    asking = asyncio.create_task(world.ask())
    await failed.wait()
    await settled()
    assert len(world.told(ModelVoided)) == 1
    world.actor.cancel("turn1")
    assert await asking == CANCELLED


# Taking over


@pytest.mark.parametrize("continues", [True, False])
async def test_a_call_that_died_with_its_owner_goes_on_where_its_text_ends(
    continues: bool,
) -> None:
    world = World(continues=continues, small=[[whole("done")]])
    [call] = world.accept()
    assert isinstance(call, CallModel)
    world.steps.record_call(world.actor, call)
    await world.flush(world.actor)
    assert await world.carry_out((RecoverModel("hälf "),)) == EndTurn("completed")
    [voided] = world.told(ModelVoided)
    assert (voided.reason, voided.text, voided.continues) == ("owner_lost", "hälf ", continues)
    assert voided.cost > 0
    assert world.told(ModelFinished)[0].text == ("hälf done" if continues else "done")


async def test_a_call_whose_text_nobody_has_begins_anew() -> None:
    world = World(continues=True, small=[[whole("done")]])
    [call] = world.accept()
    assert isinstance(call, CallModel)
    world.steps.record_call(world.actor, call)
    await world.flush(world.actor)
    assert await world.carry_out((RecoverModel(""),)) == EndTurn("completed")
    [voided] = world.told(ModelVoided)
    assert (voided.text, voided.continues, voided.cost) == ("", False, 0.0)
