"""Sessions on a model that agentray serves."""

import asyncio
from typing import Any

import aiohttp
from openai import OpenAI

from agentray.events import ModelFinished, ModelVoided, TurnResumed
from tests.followed_turn import FollowedTurn
from tests.system import System, kill, until
from tests.vllm.served import TOKENS, needs_vllm

pytestmark = needs_vllm


def events(system: System, session_id: str, kind: type[Any]) -> list[Any]:
    """Return the events of a kind, of a journal that is sound."""
    journal = system.assert_journal_sound(session_id)
    return [event for event in journal.events if isinstance(event, kind)]


def test_a_conversation_is_streamed_turn_by_turn(system: System) -> None:
    client = OpenAI(base_url=f"{system.url}/v1", api_key="none")
    conversation = client.conversations.create().id
    said: list[str] = []
    for number in range(3):
        stream = client.responses.create(
            model="assistant",
            input=f"This is message {number}.",
            conversation=conversation,
            max_output_tokens=40,
            stream=True,
        )
        items = list(stream)
        deltas = [e.delta for e in items if e.type == "response.output_text.delta"]
        last = items[-1]
        assert last.type == "response.incomplete"  # it reached its limit of tokens
        assert "".join(deltas) == last.response.output_text
        assert last.response.usage is not None
        assert last.response.usage.output_tokens == 40
        said.append(last.response.output_text)
    assert all(said)
    # Each turn's prompt holds all that was said before.
    prompts = [event.usage.input_tokens for event in events(system, conversation, ModelFinished)]
    assert prompts == sorted(set(prompts))
    assert len(prompts) == 3


async def test_an_answer_survives_the_death_of_its_owner_letter_for_letter(system: System) -> None:
    async with aiohttp.ClientSession() as http:
        for session_id in ("whole", "killed"):
            async with http.post(f"{system.url}/v1/sessions", json={"id": session_id}) as made:
                assert made.status == 201, await made.text()
        whole = await FollowedTurn(http, system.url, "whole", "Speak.").run()

        turn = FollowedTurn(http, system.url, "killed", "Speak.")
        running = asyncio.create_task(turn.run())
        # Known before there is text: the model has said all that it may within a second.
        owner, _ = await until(lambda: system.owner_of("killed"), what="the owner")
        await until(lambda: turn.text_so_far > TOKENS // 10 or None, what="some text")
        kill(owner.pid)
        await running

    # Once for the kill; a machine that stands still for seconds may cost another owner its term.
    resumed = [event.phase for event in events(system, "killed", TurnResumed)]
    assert set(resumed) == {"streaming"}
    voided = events(system, "killed", ModelVoided)
    assert len(voided) == len(resumed)
    assert all(event.continues for event in voided)
    assert 0 < len(voided[0].text) < len(turn.text)
    # The model is deterministic: continued, it says what it says uninterrupted. The limit of
    # tokens holds for each call, so a text that was continued is longer; on a machine that stands
    # still that can be both.
    shared = min(len(whole.text), len(turn.text))
    assert shared >= TOKENS // 2
    assert shared > len(voided[0].text)
    assert turn.text[:shared] == whole.text[:shared]
    assert turn.status == whole.status == "incomplete"
