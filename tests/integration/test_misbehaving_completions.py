"""Stateless completions whose models misbehave: what falls back, what goes on, and what is told."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from agentray.clock import SystemClock
from agentray.config.settings import ModelsSettings
from agentray.errors import ModelError, ModelRateLimitedError, ModelUnavailableError
from agentray.models.catalog import Catalog
from agentray.models.client import ModelClient
from agentray.models.completions import Completions, CompletionStream
from agentray.models.router import Router
from agentray.telemetry.metrics import Metrics
from tests.integration.misbehaving import (
    CLOSE,
    DONE,
    END,
    HANG,
    SSE,
    Steps,
    error_body,
    in_turn,
    part,
    response,
    script,
    speaking,
)

IMPATIENT = {
    "connect_timeout_s": 0.6,
    "first_token_timeout_s": 0.6,
    "stall_timeout_s": 0.4,
    "step_timeout_s": 4.0,
}
ASKED: dict[str, Any] = {
    "model": "m",
    "messages": [{"role": "user", "content": "hi"}],
    "stream": True,
}
TEXT = {"role": "assistant", "content": "one "}


def chunk(delta: dict[str, Any] | None, finish: str | None = None, **head: Any) -> bytes:
    """Return an event of a stream, with a head as real servers give it."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    fields = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "up"}
    return part(b"data: " + json.dumps({**fields, "choices": choices, **head}).encode() + b"\n\n")


ROLE = chunk({"role": "assistant", "content": ""})
FIRST: Steps = [SSE, ROLE, chunk({"content": "one "}), 0.05]
OTHER = {"id": "c2", "created": 2, "model": "up-2"}
REST: Steps = [
    SSE,
    chunk({"role": "assistant", "content": ""}, **OTHER),
    chunk({"content": "two "}, **OTHER),
    chunk({"content": "three"}, **OTHER),
    chunk({}, "stop", **OTHER),
    DONE,
    END,
]


@dataclass
class Seen:
    """What a client made of a stream; ``error`` is what ended it early."""

    raw: bytes = b""
    error: ModelError | None = None

    @property
    def chunks(self) -> list[dict[str, Any]]:
        lines = [line[6:] for line in self.raw.split(b"\n") if line.startswith(b"data: {")]
        return [json.loads(line) for line in lines]

    @property
    def choices(self) -> list[dict[str, Any]]:
        return [choice for each in self.chunks for choice in each["choices"]]

    @property
    def text(self) -> str:
        return "".join(choice["delta"].get("content") or "" for choice in self.choices)

    def is_one_stream(self) -> None:
        """Assert that it looks as if one call had answered it all."""
        assert self.error is None
        assert {(c["id"], c["created"], c["model"]) for c in self.chunks} == {("c1", 1, "up")}
        roles = [choice["delta"] for choice in self.choices if "role" in choice["delta"]]
        assert len(roles) == 1
        ends = [choice["finish_reason"] for choice in self.choices if choice["finish_reason"]]
        assert ends == [self.choices[-1]["finish_reason"]]
        assert self.raw.count(b"data: [DONE]") == 1
        assert self.raw.rstrip().endswith(b"data: [DONE]")


@asynccontextmanager
async def completions(*urls: str, **bad: Any) -> AsyncIterator[Completions]:
    """Complete with a model at each URL, in this order of preference, the first one being m."""
    names = ("m", "second")
    endpoints = {name: {"url": url, **bad} for name, url in zip(names, urls, strict=False)}
    settings = ModelsSettings.model_validate({"endpoints": endpoints, **IMPATIENT})
    catalog = Catalog(settings, "http://127.0.0.1:1/models")
    client = ModelClient(catalog, settings)
    router = Router(catalog, settings, clock=SystemClock(), metrics=Metrics(), rng=random.Random(1))
    try:
        yield Completions(router, client, settings)
    finally:
        await client.close()


async def read(answers: Completions, model: str | None = None, **fields: Any) -> Seen:
    completion = await answers.complete(model, json.dumps({**ASKED, **fields}).encode())
    stream = completion.body
    assert isinstance(stream, CompletionStream)
    seen = Seen()
    try:
        async for data in stream:
            assert data.endswith(b"\n"), "an event was cut"
            seen.raw += data
    except ModelError as error:
        seen.error = error
    finally:
        await stream.aclose()
    return seen


BREAKS: dict[str, Steps] = {
    "is cut off": [CLOSE],
    "ends early": [END],
    "stalls": [HANG],
    "turns malformed": [part(b"data: {broken\n\n"), HANG],
    "breaks off within an event": [part(b'data: {"id":"c1","choi'), CLOSE],
    "an error in its stream": [part(b"data: " + error_body(message="oops", code=500) + b"\n\n")],
    "gives its answer up": [chunk({}, "abort"), DONE, END],
}


@pytest.mark.parametrize("name", BREAKS)
async def test_a_stream_that_breaks_off_goes_on_as_one(name: str) -> None:
    async with (
        speaking(in_turn([*FIRST, *BREAKS[name]], REST)) as endpoint,
        completions(endpoint.url, continues_text=True) as answers,
    ):
        seen = await read(answers, max_tokens=10, temperature=0.5)
    seen.is_one_stream()
    assert seen.text == "one two three"
    assert b": the model's stream broke off (model_unavailable) and goes on\n" in seen.raw
    first, second = endpoint.bodies
    assert second == {
        **first,
        "messages": [*first["messages"], TEXT],
        "max_tokens": 9,
        "continue_final_message": True,
        "add_generation_prompt": False,
    }


async def test_a_stream_goes_on_as_often_as_a_step_may_be_tried() -> None:
    again: Steps = [SSE, chunk({"content": "two "}, **OTHER), 0.05, CLOSE]
    async with (
        speaking(in_turn([*FIRST, CLOSE], again, REST)) as endpoint,
        completions(endpoint.url, continues_text=True) as answers,
    ):
        seen = await read(answers)
    seen.is_one_stream()
    assert seen.text == "one two two three"
    assert [body["messages"][-1]["content"] for body in endpoint.bodies] == [
        "hi",
        "one ",
        "one two ",
    ]
    async with (
        speaking(script([*FIRST, CLOSE])) as endpoint,
        completions(endpoint.url, continues_text=True) as answers,
    ):
        seen = await read(answers)
    assert isinstance(seen.error, ModelUnavailableError)
    assert len(endpoint.requests) == 3


async def test_the_tokens_of_all_parts_are_counted_as_one_answers() -> None:
    usage = {"prompt_tokens": 8, "completion_tokens": 3, "total_tokens": 11}
    counted = [*REST[:-2], chunk(None, usage=usage), *REST[-2:]]
    async with (
        speaking(in_turn([*FIRST, CLOSE], counted)) as endpoint,
        completions(endpoint.url, continues_text=True) as answers,
    ):
        seen = await read(answers, stream_options={"include_usage": True})
    seen.is_one_stream()
    assert seen.chunks[-1]["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 4,
        "total_tokens": 11,
    }


async def test_a_text_that_was_complete_when_it_broke_off_just_ends() -> None:
    nothing: Steps = [SSE, chunk({}, "stop", **OTHER), DONE, END]
    async with (
        speaking(in_turn([*FIRST, CLOSE], nothing)) as endpoint,
        completions(endpoint.url, continues_text=True) as answers,
    ):
        seen = await read(answers)
    seen.is_one_stream()
    assert seen.text == "one "
    assert len(endpoint.requests) == 2


CALL = chunk({"tool_calls": [{"index": 0, "id": "c", "function": {"name": "f", "arguments": "{"}}]})
NOT_SPLICED: dict[str, tuple[Steps, dict[str, Any], dict[str, Any]]] = {
    "an endpoint that cannot": (FIRST, {}, {"continues_text": False}),
    "several choices": (FIRST, {"n": 2}, {}),
    "log-probabilities": (FIRST, {"logprobs": True}, {}),
    "a form": (FIRST, {"response_format": {"type": "json_object"}}, {}),
    "a grammar": (FIRST, {"guided_regex": "a+"}, {}),
    "a text of the caller's": (FIRST, {"continue_final_message": True}, {}),
    "a tool call": ([SSE, ROLE, CALL, 0.05], {}, {}),
    "a tool call behind text": ([*FIRST, CALL, 0.05], {}, {}),
}


@pytest.mark.parametrize("name", NOT_SPLICED)
async def test_what_cannot_be_put_together_ends_with_its_error(name: str) -> None:
    steps, asked, bad = NOT_SPLICED[name]
    async with (
        speaking(in_turn([*steps, CLOSE], REST)) as endpoint,
        completions(endpoint.url, **{"continues_text": True, **bad}) as answers,
    ):
        seen = await read(answers, **asked)
    assert isinstance(seen.error, ModelUnavailableError)
    assert "broke off" in seen.error.message
    assert b"[DONE]" not in seen.raw
    assert len(endpoint.requests) == 1


BEFORE: dict[str, Steps] = {
    "hangs": [HANG],
    "says its role and hangs": [SSE, ROLE, HANG],
    "says that it is there and closes": [SSE, part(b": here\n\n"), 0.05, CLOSE],
    "closes at once": [CLOSE],
    "500": response(500, error_body(message="oh no")),
    "429": response(429, b"{}"),
    "an error as success": response(200, error_body(message="out of order")),
    "a page": response(200, b"<html>", "text/html"),
    "malformed": [SSE, part(b"<html>\n"), HANG],
    "an empty answer": [SSE, ROLE, 0.05, chunk({}, "stop"), DONE, END],
}


@pytest.mark.parametrize("name", BEFORE)
async def test_before_the_first_token_another_model_answers_and_nobody_sees_it(name: str) -> None:
    good = [*FIRST, chunk({"content": "two"}), chunk({}, "stop"), DONE, END]
    async with (
        speaking(script(BEFORE[name])) as bad,
        speaking(script(good)) as second,
        completions(bad.url, second.url) as answers,
    ):
        seen = await read(answers)
    seen.is_one_stream()
    assert seen.text == "one two"
    assert seen.raw.startswith(b"data: ")
    assert (len(bad.requests), len(second.requests)) == (1, 1)


@pytest.mark.parametrize("name", BEFORE)
async def test_without_another_model_the_error_is_the_answer(name: str) -> None:
    async with (
        speaking(script(BEFORE[name])) as endpoint,
        completions(endpoint.url) as answers,
    ):
        with pytest.raises(ModelError) as caught:
            await read(answers)
    kind = ModelRateLimitedError if name == "429" else ModelUnavailableError
    assert type(caught.value) is kind
    assert len(endpoint.requests) <= 3


async def test_a_stream_without_the_mark_of_its_end_gets_one() -> None:
    whole: Steps = [*FIRST, chunk({}, "stop"), END]
    async with speaking(script(whole)) as endpoint, completions(endpoint.url) as answers:
        seen = await read(answers)
    seen.is_one_stream()
    assert seen.text == "one "


async def test_a_model_that_is_limited_is_said_to_be_and_not_to_be_broken() -> None:
    limited = response(429, b"{}", retry_after="30")
    async with speaking(script(limited)) as endpoint, completions(endpoint.url) as answers:
        for _ in range(2):
            with pytest.raises(ModelRateLimitedError) as caught:
                await read(answers)
            assert 25 < caught.value.fields["retry_after_s"] <= 30
    assert len(endpoint.requests) == 1


async def test_a_caller_that_leaves_while_a_stream_is_to_go_on_ends_it() -> None:
    async with (
        speaking(in_turn([*FIRST, CLOSE], [HANG])) as endpoint,
        completions(endpoint.url, continues_text=True) as answers,
    ):
        reading = asyncio.create_task(read(answers))
        async with asyncio.timeout(5):
            while len(endpoint.requests) < 2:  # noqa: ASYNC110 - another task's
                await asyncio.sleep(0.005)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
    assert len(endpoint.requests) == 2
