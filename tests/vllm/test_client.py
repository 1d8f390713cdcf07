"""The model client on a real model: vLLM served by agentray, with the model of ``tiny_llama``.

It says one character per token, always speaks on until it is stopped, and with temperature 0 says
the same to the same conversation.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest

from agentray.config.settings import ModelsSettings
from agentray.errors import ModelError
from agentray.models.base import ModelProgress, ModelRequest
from agentray.models.catalog import Catalog
from agentray.models.client import ModelClient, RawStream
from tests.system import until
from tests.vllm.served import ServedSystem, needs_vllm

pytestmark = needs_vllm

SYSTEM = "You are the voice of a very small model. " * 8
TOKENS = 48


@pytest.fixture
async def client(system: ServedSystem) -> AsyncIterator[ModelClient]:
    url = system.model_url
    endpoints = {
        "tiny": {"url": url, "continues_text": True},
        "lost": {"url": url, "upstream": "no-such-model"},
    }
    settings = ModelsSettings.model_validate({"endpoints": endpoints})
    client = ModelClient(Catalog(settings, ""), settings)
    yield client
    await client.close()


def asks(*contents: str, **fields: Any) -> ModelRequest:
    roles = ("user", "assistant")
    messages = [{"role": "system", "content": SYSTEM}]
    messages += [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    defaults = {"model": "tiny", "temperature": 0.0, "max_output_tokens": TOKENS}
    encoded = json.dumps(messages)[1:-1].encode()
    return ModelRequest(messages=encoded, **{**defaults, **fields})


async def collect(client: ModelClient, request: ModelRequest) -> list[ModelProgress]:
    async with aclosing(client.stream(request)) as answer:
        return [progress async for progress in answer]


async def say(client: ModelClient, *contents: str, **fields: Any) -> str:
    answer = await collect(client, asks(*contents, **fields))
    return "".join(progress.text for progress in answer)


async def test_an_answer_is_streamed_and_its_usage_is_there(client: ModelClient) -> None:
    answer = await collect(client, asks("hello"))
    assert len(answer) > 1  # on a busy machine much comes at once
    assert len("".join(progress.text for progress in answer)) == TOKENS
    assert answer[-1].finish_reason == "length"
    assert answer[-1].usage.output_tokens == TOKENS
    assert answer[-1].usage.input_tokens > len(SYSTEM)


async def test_the_conversation_decides_the_answer_and_its_prefix_is_cached(
    client: ModelClient,
) -> None:
    first = await say(client, "hello")
    assert await say(client, "hello") == first
    then = await collect(client, asks("hello", first, "and then?"))
    assert then[-1].usage.cached_tokens > 0
    other = await say(client, "good bye", first, "and then?")
    assert other != "".join(progress.text for progress in then)


async def test_a_text_that_is_cut_anywhere_goes_on_as_if_it_never_had_been(
    client: ModelClient,
) -> None:
    spaces = 0
    for prompt in ("hello", "what is your name?", "tell me more"):
        whole = await say(client, prompt)
        behind_spaces = [i + 1 for i, letter in enumerate(whole[:-1]) if letter == " "]
        spaces += len(behind_spaces)
        for cut in {1, 2, TOKENS // 2, TOKENS - 1, *behind_spaces}:
            rest = await say(
                client, prompt, whole[:cut], continue_text=True, max_output_tokens=TOKENS - cut
            )
            assert whole[:cut] + rest == whole
    # The spaces at a cut are what a chat template may strip.
    assert spaces


async def test_an_answer_that_broke_off_is_resumed_from_what_was_heard(
    client: ModelClient,
) -> None:
    # So long that it cannot come at once, however busy the machine is.
    most = 20 * TOKENS
    whole = await say(client, "tell me a story", max_output_tokens=most)
    said = ""
    request = asks("tell me a story", max_output_tokens=most)
    async with aclosing(client.stream(request)) as answer:
        async for progress in answer:
            said += progress.text
            if len(said) >= 5:
                break
    assert said != whole
    rest = await say(
        client,
        "tell me a story",
        said,
        continue_text=True,
        max_output_tokens=most - len(said),
    )
    assert said + rest == whole


async def test_closing_the_iterator_stops_the_engine(
    client: ModelClient, system: ServedSystem
) -> None:
    async with aclosing(client.stream(asks("go on", max_output_tokens=7000))) as answer:
        assert (await anext(answer)).text
        assert system.metric("vllm:num_requests_running") == 1
    await until(
        lambda: system.metric("vllm:num_requests_running") == 0, timeout_s=10, what="it stops"
    )


async def test_many_answers_at_once_are_all_whole(client: ModelClient) -> None:
    prompts = [f"question {i}" for i in range(24)]
    alone = await say(client, prompts[0])
    answers = await asyncio.gather(*(say(client, prompt) for prompt in prompts))
    assert [len(answer) for answer in answers] == [TOKENS] * 24
    assert answers[0] == alone


async def test_tools_can_be_offered(client: ModelClient) -> None:
    tool = {
        "type": "function",
        "function": {
            "name": "echo",
            "parameters": {"type": "object", "properties": {"text": {"type": "string"}}},
        },
    }
    assert await say(client, "hello", tools=json.dumps(tool).encode())


async def test_what_the_server_refuses_is_a_lasting_error(client: ModelClient) -> None:
    for request, status in ((asks("x" * 9000), 400), (asks("hello", model="lost"), 404)):
        with pytest.raises(ModelError) as caught:
            await collect(client, request)
        assert caught.value.fields["status"] == status
        assert not caught.value.retryable


async def test_a_raw_body_is_passed_on_and_back(client: ModelClient) -> None:
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 8,
        "temperature": 0,
    }
    whole = await client.complete_raw("tiny", body)
    assert isinstance(whole, bytes)
    text = json.loads(whole)["choices"][0]["message"]["content"]
    assert len(text) == 8
    stream = await client.complete_raw("tiny", {**body, "stream": True})
    assert isinstance(stream, RawStream)
    async with aclosing(stream):
        events = b"".join([chunk async for chunk in stream]).split(b"\n\n")
    assert events[-2:] == [b"data: [DONE]", b""]
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in events[:-2]]
    deltas = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
    assert "".join(deltas) == text
