"""Sessions whose models answer, but not as they should: tool calls, prompts and forms."""

from __future__ import annotations

import itertools
import json

import pytest

from agentray.events import ToolFinished, TurnOptions
from tests.followed_turn import script as sim
from tests.integration.misbehaving import (
    CLOSE,
    END,
    HANG,
    SSE,
    Steps,
    answer,
    calls,
    error_body,
    event,
    in_turn,
    response,
    script,
    speaking,
)
from tests.integration.scenes import BAD, ONE, PLAIN, SIMULATOR, Play

# Tool calls that are no good


BROKEN_CALLS = {
    "no JSON": ('{"text": ', "no JSON"),
    "no object": ('"hi"', "no JSON object"),
    "not of the schema": ('{"text": 5}', "arguments of echo: text"),
}


@pytest.mark.parametrize("name", BROKEN_CALLS)
async def test_a_tool_call_that_is_no_good_is_not_run_and_its_model_may_mend_it(
    name: str, play: Play
) -> None:
    arguments, problem = BROKEN_CALLS[name]
    async with (
        speaking(in_turn(calls("echo", arguments), answer("mended"))) as endpoint,
        play(endpoint.url) as scene,
    ):
        told = await scene.run("hello", BAD)
        assert (told.end.status, told.reader.text) == ("completed", "mended")
        [finished] = told.events.of(ToolFinished)
        assert finished.status == "error"
        assert finished.output.startswith("Not run: ")
        assert problem in finished.output
        assert endpoint.bodies[1]["messages"][-1]["content"] == finished.output
        await scene.still_answers()


@pytest.mark.parametrize("name", BROKEN_CALLS)
async def test_a_tool_call_that_is_no_good_goes_to_the_next_tier_once(
    name: str, play: Play
) -> None:
    arguments, _ = BROKEN_CALLS[name]
    async with (
        speaking(script(calls("echo", arguments))) as endpoint,
        play(endpoint.url, bad={"card": {"tier": "small"}}) as scene,
    ):
        told = await scene.run(sim("well answered", tokens=1))
        assert told.end.status == "completed"
        assert told.models == ["bad", "simulator"]
        [voided] = told.voided
        assert (voided.reason, voided.escalates) == ("answer_rejected", True)
        assert not told.events.of(ToolFinished)
        assert told.kinds == PLAIN
        assert len(endpoint.requests) == 1
        await scene.still_answers()


async def test_a_model_that_never_mends_its_tool_calls_ends_with_its_steps(play: Play) -> None:
    async with (
        speaking(script(calls("echo", "{"))) as endpoint,
        play(endpoint.url, agent={"max_steps": 3}) as scene,
    ):
        told = await scene.run("hello", BAD)
        assert told.end.status == "incomplete"
        assert told.end.error is not None
        assert told.end.error.code == "max_steps"
        assert len(endpoint.requests) == 3
        await scene.still_answers()


# Prompts that are too long


TOO_LONG = {
    "OpenAI's": error_body(
        message="This model's maximum context length is 4097 tokens. However, your messages "
        "resulted in 5000 tokens. Please reduce the length of the messages.",
        type="invalid_request_error",
        param="messages",
        code="context_length_exceeded",
    ),
    "vLLM's": error_body(
        message="This model's maximum context length is 4096 tokens. However, you requested 5000 "
        "tokens in the messages, Please reduce the length of the messages.",
        type="BadRequestError",
        param=None,
        code=400,
    ),
}


@pytest.mark.parametrize("wording", TOO_LONG)
async def test_a_prompt_that_is_too_long_goes_to_another_window(wording: str, play: Play) -> None:
    async with (
        speaking(script(response(400, TOO_LONG[wording]))) as endpoint,
        play(endpoint.url) as scene,
    ):
        told = await scene.run(sim("well answered", tokens=1))
        assert (told.end.status, told.kinds) == ("completed", PLAIN)
        assert told.models == ["bad", "simulator"]
        assert [voided.reason for voided in told.voided] == ["context_length_exceeded"]
        assert told.called[1].route is not None
        assert "context window is too short" in told.called[1].route.reason
        assert len(endpoint.requests) == 1
        await scene.still_answers()


@pytest.mark.parametrize("wording", TOO_LONG)
async def test_without_another_window_less_of_the_past_is_shown_once(
    wording: str, play: Play
) -> None:
    async with (
        speaking(script(response(400, TOO_LONG[wording]))) as endpoint,
        play(endpoint.url) as scene,
    ):
        for n in range(2):
            await scene.run(sim(f"answer {n}"), SIMULATOR)
        told = await scene.run("hello", BAD)
        told.failed("context_length_exceeded", "context length")
        assert told.models == ["bad", "bad"]
        whole, half = (body["messages"] for body in endpoint.bodies)
        assert len(whole) == 5
        assert half == whole[2:]
        await scene.still_answers()


async def test_a_prompt_that_fits_with_half_the_past_is_answered(play: Play) -> None:
    short = in_turn(response(400, TOO_LONG["vLLM's"]), answer("fits"))
    async with speaking(short) as endpoint, play(endpoint.url) as scene:
        for n in range(2):
            await scene.run(sim(f"answer {n}"), SIMULATOR)
        told = await scene.run("hello", BAD)
        assert (told.end.status, told.reader.text) == ("completed", "fits")
        assert told.items == [("completed", "fits")]
        await scene.still_answers()


# Answers in a form


WORD = {
    "type": "object",
    "properties": {"word": {"type": "string"}},
    "required": ["word"],
    "additionalProperties": False,
}
FORMED = TurnOptions(model="bad", output_schema=WORD, output_form={"name": "word", "strict": True})


async def test_an_answer_with_a_schema_is_held_back_until_it_is_verified(play: Play) -> None:
    pieces = ['{"word": ', '"hi', '"}']
    steps: Steps = [SSE, *itertools.chain(*([event(piece), 0.05] for piece in pieces))]
    async with (
        speaking(script([*steps, event("", "stop"), END])) as endpoint,
        play(endpoint.url) as scene,
    ):
        told = await scene.run("hello", FORMED)
        assert told.end.status == "completed"
        assert json.loads(told.reader.text) == {"word": "hi"}
        assert len(told.reader.deltas) <= 1
        [body] = endpoint.bodies
        assert body["response_format"] == {
            "type": "json_schema",
            "json_schema": {"name": "word", "strict": True, "schema": WORD},
        }
        await scene.still_answers()


@pytest.mark.parametrize("text", ["no JSON at all", '{"word": 5}', '{"word": "a", "more": 1}'])
async def test_an_answer_that_does_not_follow_its_schema_is_never_shown_as_one(
    text: str, play: Play
) -> None:
    async with speaking(script(answer(text))) as endpoint, play(endpoint.url) as scene:
        told = await scene.run("hello", FORMED)
        told.failed("output_invalid", "model 'bad'")
        assert not told.reader.deltas
        assert len(endpoint.requests) == 1
        await scene.still_answers()


async def test_an_answer_that_does_not_follow_its_schema_goes_to_the_next_tier(play: Play) -> None:
    async with (
        speaking(script(answer('{"word": 5}'))) as endpoint,
        play(endpoint.url, bad={"card": {"tier": "small"}}) as scene,
    ):
        told = await scene.run(sim('{"word": "hi"}', tokens=1), TurnOptions(output_schema=WORD))
        assert (told.end.status, told.kinds) == ("completed", PLAIN)
        assert json.loads(told.reader.text) == {"word": "hi"}
        assert told.models == ["bad", "simulator"]
        assert [voided.reason for voided in told.voided] == ["answer_rejected"]
        await scene.still_answers()


@pytest.mark.parametrize("end", [HANG, CLOSE], ids=["stalls", "is cut off"])
async def test_a_part_of_an_answer_with_a_schema_is_not_shown_and_not_gone_on_with(
    end: float, play: Play
) -> None:
    whole = answer('{"word": "hi"}')
    async with (
        speaking(in_turn([*ONE, end], whole)) as endpoint,
        play(endpoint.url, bad={"continues_text": True}) as scene,
    ):
        told = await scene.run("hello", FORMED)
        assert (told.end.status, told.kinds) == ("completed", PLAIN)
        assert json.loads(told.reader.text) == {"word": "hi"}
        assert "continue_final_message" not in endpoint.bodies[1]
        await scene.still_answers()
