"""Models that agentray serves: loading, scaling, affinity, and replicas that die.

What dies, dies in the last test of the last file: its start anew takes a minute and a half.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
from openai import OpenAI

from agentray.app.processes import alive, children
from agentray.events import TurnFinished
from tests.followed_turn import FollowedTurn
from tests.system import kill, until
from tests.vllm.served import BROKEN, LOAD_S, TINY, ServedSystem, needs_vllm

pytestmark = needs_vllm

CONVERSATIONS = 6
TURNS = 4
# Long against a block of vLLM's cache, so that hits are counted and not lost to rounding.
MESSAGE_CHARS = 500
ANSWER_TOKENS = 16


def test_the_platform_is_ready_and_answers_while_its_models_load(starting: ServedSystem) -> None:
    assert starting.at_start["ready"] is True
    assert [starting.at_start["models"][model]["healthy"] for model in (TINY, BROKEN)] == [
        False,
        False,
    ]
    client = OpenAI(base_url=f"{starting.url}/v1", api_key="none")
    answer = client.responses.create(model="simulator", input="hello")
    assert answer.status == "completed"
    assert answer.output_text


async def test_a_model_that_does_not_load_says_why_and_the_platform_goes_on(
    system: ServedSystem,
) -> None:
    def failed() -> Any:
        health = system.health(BROKEN)
        assert not health["healthy"]
        return health if "does not load" in health["reason"] else None

    health = await until(failed, timeout_s=LOAD_S, what="its loading is given up")
    # The engine's own words, from a process that is gone; not that there was an error.
    assert "SafetensorError: " in health["reason"]
    assert "does not load" in system.output.read_text()
    client = OpenAI(base_url=f"{system.url}/v1", api_key="none")
    assert client.responses.create(model=TINY, input="hello", max_output_tokens=8).output_text


async def test_load_starts_a_second_replica(system: ServedSystem) -> None:
    await _two_replicas(system)
    async with aiohttp.ClientSession() as http:
        calls = [_chat(http, system, [_message(str(i))]) for i in range(8)]
        assert all(await asyncio.gather(*calls))


async def test_a_session_finds_its_prefix_cached_more_often_than_calls_that_are_spread(
    system: ServedSystem,
) -> None:
    await _two_replicas(system)
    shares = {kind: await _cached_share(system, kind) for kind in ("session", "none")}
    print(f"\nprompt tokens found in the replicas' caches: {shares}")  # noqa: T201
    # Of the prompts of four turns, three quarters of the last three are known where the session
    # stays; each second time where its calls alternate.
    assert shares["session"] > 0.5
    assert shares["session"] > 1.2 * shares["none"]


async def test_the_death_of_a_replica_in_mid_stream_ends_well(system: ServedSystem) -> None:
    async with aiohttp.ClientSession() as http:
        made = await http.post(f"{system.url}/v1/sessions", json={"id": "orphaned"})
        assert made.status == 201, await made.text()
        turn = FollowedTurn(http, system.url, "orphaned", "Speak.")
        running = asyncio.create_task(turn.run())
        await until(lambda: turn.text_so_far > 100 or None, what="some text")
        victims = system.replica_pids()
        engines = [pid for victim in victims for pid in children(victim)]
        assert victims
        assert engines
        for pid in victims:
            kill(pid)
        await running
    # What the client saw, FollowedTurn has compared with what the turn says at its end.
    assert turn.status in ("completed", "incomplete")
    journal = system.assert_journal_sound("orphaned")
    [finished] = [event for event in journal.events if isinstance(event, TurnFinished)]
    assert finished.status in ("completed", "incomplete")
    assert turn.text == journal.turn(turn.turn_id).text
    # An engine without its replica would hold its accelerator for ever.
    await until(
        lambda: not any(map(alive, engines)), timeout_s=30, what="the engines of the dead end"
    )
    await until(lambda: not system.health(TINY)["healthy"], timeout_s=30, what="its death is told")


async def _two_replicas(system: ServedSystem) -> None:
    """Call the model without end until it has two replicas."""
    async with aiohttp.ClientSession() as http:
        callers = [asyncio.create_task(_call_on(http, system, i)) for i in range(12)]
        try:
            await system.until_replicas(2)
        finally:
            for caller in callers:
                caller.cancel()
            await asyncio.gather(*callers, return_exceptions=True)


async def _call_on(http: aiohttp.ClientSession, system: ServedSystem, number: int) -> None:
    while len(system.replicas()) < 2:
        await _chat(http, system, [_message(f"load {number}")], max_tokens=256)


async def _cached_share(system: ServedSystem, kind: str) -> float:
    """Hold conversations; return the share of their prompts that was found in a cache."""
    rng = random.Random(kind)
    queries, hits = "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"
    before = {name: system.metric(name) for name in (queries, hits)}
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(aiohttp.ClientSession())
        for number in range(CONVERSATIONS):
            headers = {"x-session-id": f"{kind}-{number}"} if kind == "session" else {}
            messages: list[dict[str, str]] = []
            for _ in range(TURNS):
                messages.append(_message("".join(rng.choices("abcdefgh", k=MESSAGE_CHARS))))
                said = await _chat(
                    http, system, messages, max_tokens=ANSWER_TOKENS, headers=headers
                )
                messages.append({"role": "assistant", "content": said})
    spent = {name: system.metric(name) - value for name, value in before.items()}
    return spent[hits] / spent[queries]


def _message(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


async def _chat(
    http: aiohttp.ClientSession,
    system: ServedSystem,
    messages: list[dict[str, str]],
    *,
    max_tokens: int = 16,
    headers: dict[str, str] | None = None,
) -> str:
    body = {"model": TINY, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
    url = f"{system.model_url}/chat/completions"
    async with http.post(url, json=body, headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        return (await answer.json())["choices"][0]["message"]["content"]
