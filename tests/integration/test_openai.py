"""The openai package, unmodified, against a whole system."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.responses import Response, ResponseStreamEvent

from tests.followed_turn import echo, script
from tests.integration.wire import CuttingProxy, eventually
from tests.system import System

STORY = "Once upon a time an actor kept a journal of all that it did."
SLOW = script(STORY, tokens=12, tps=20)
ENDLESS = script("never read to its end", tokens=10_000, tps=10)


@pytest.fixture(scope="module")
def ai(system: System) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{system.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def session_of(response: Response) -> str:
    return response.id.split("_", 2)[2]


def deltas(events: list[ResponseStreamEvent]) -> str:
    return "".join(e.delta for e in events if e.type == "response.output_text.delta")


def others(events: list[ResponseStreamEvent]) -> list[tuple[str, int]]:
    return [
        (event.type, event.sequence_number)
        for event in events
        if event.type != "response.output_text.delta"
    ]


# Creating and streaming


def test_a_response_is_created_and_retrieved(ai: OpenAI) -> None:
    created = ai.responses.create(
        model="assistant", input="My name is Ada.", metadata={"a": "b"}, user="ada"
    )
    assert created.output_text.startswith("Nice to meet you, Ada.")
    assert (created.status, created.model, created.metadata) == (
        "completed",
        "assistant",
        {"a": "b"},
    )
    assert created.usage is not None
    assert created.usage.total_tokens == created.usage.input_tokens + created.usage.output_tokens
    assert ai.responses.retrieve(created.id) == created


def test_a_model_can_be_named_in_the_place_of_an_agent(ai: OpenAI) -> None:
    assert ai.responses.create(model="simulator", input="hi").model == "simulator"


WORD: dict[str, object] = {
    "type": "object",
    "properties": {"word": {"type": "string"}},
    "required": ["word"],
}


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_follows_the_schema_that_was_asked_for(ai: OpenAI, stream: bool) -> None:
    form: Any = {"type": "json_schema", "name": "word", "schema": WORD, "strict": False}
    given: Any = {"text": {"format": form}, "stream": stream}
    good = ai.responses.create(input=script('{"word": "hi"}'), **given)
    bad = ai.responses.create(input=script('{"word": 5}'), **given)
    if stream:
        events = list(good)
        assert deltas(events) == '{"word": "hi"}'
        failed = list(bad)
        assert not deltas(failed)
        good, bad = events[-1].response, failed[-1].response
    assert json.loads(good.output_text) == {"word": "hi"}
    assert good.text.format.name == "word"
    assert ai.responses.retrieve(good.id) == good
    assert (bad.status, bad.output_text) == ("failed", "")
    assert bad.error.message.startswith("model 'simulator': ")


def test_instructions_and_limits_reach_the_model(ai: OpenAI) -> None:
    response = ai.responses.create(input="hi", instructions="Be brief.", max_output_tokens=2)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.instructions == "Be brief."
    assert response.output_text == "You said: "


def test_a_stream_has_openais_events_and_the_whole_text(ai: OpenAI) -> None:
    with ai.responses.stream(model="assistant", input=SLOW) as stream:
        events = list(stream)
        final = stream.get_final_response()
    kinds = [event.type for event in events]
    text = kinds.count("response.output_text.delta")
    assert text > 3
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * text,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    numbers = [event.sequence_number for event in events if hasattr(event, "sequence_number")]
    assert numbers == sorted(set(numbers))
    assert final.output_text == STORY
    assert ai.responses.retrieve(final.id).output_text == STORY


async def test_the_async_client_streams_too(system: System) -> None:
    async with openai.AsyncOpenAI(base_url=f"{system.url}/v1", api_key="none") as client:
        stream = await client.responses.create(input=script(STORY), stream=True)
        events = [event async for event in stream]
    assert deltas(events) == STORY


def test_tool_calls_are_items_of_the_response(ai: OpenAI) -> None:
    tools = [echo("a"), echo("b")]
    asked = script("They said: {tool_results}", tools=tools, parallel=True)
    stream = ai.responses.create(input=asked, stream=True)
    events = list(stream)
    last = events[-1]
    assert last.type == "response.completed"
    kinds = [item.type for item in last.response.output]
    assert kinds == ["mcp_call", "mcp_call", "message"]
    calls = [item for item in last.response.output if item.type == "mcp_call"]
    assert [(call.name, call.status, call.output) for call in calls] == [
        ("echo", "completed", "a"),
        ("echo", "completed", "b"),
    ]
    assert last.response.output_text == deltas(events) == "They said: a, b"


# Resuming


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param(script(STORY, tokens=12, tps=300), id="one answer"),
        pytest.param(
            script("a {tool_results} z", tokens=6, tps=300, tools=[echo("1"), echo("2")]),
            id="with tools",
        ),
        pytest.param(script(STORY, tokens=12, tps=300)[:-1] + ', "fail_after": 5}', id="continued"),
    ],
)
def test_from_every_place_of_a_response_the_rest_is_exactly_what_was_missing(
    ai: OpenAI, asked: str
) -> None:
    events = list(ai.responses.create(input=asked, stream=True))
    first, last = events[0], events[-1]
    assert first.type == "response.created"
    assert last.type == "response.completed"
    text = last.response.output_text
    assert deltas(events) == text
    for cut, event in enumerate(events[:-1], 1):
        rest = list(
            ai.responses.retrieve(
                first.response.id, stream=True, starting_after=event.sequence_number
            )
        )
        assert deltas(events[:cut]) + deltas(rest) == text, f"behind {event}"
        assert others(rest) == others(events[cut:]), f"behind {event}"
        numbers = [each.sequence_number for each in rest]
        assert numbers == sorted(set(numbers))
        assert numbers[0] > event.sequence_number


@pytest.mark.parametrize("after", [1, 4, 8])
def test_a_stream_that_is_cut_while_the_answer_comes_is_taken_up(ai: OpenAI, after: int) -> None:
    stream = ai.responses.create(input=script(STORY, tokens=12, tps=10), stream=True)
    seen: list[ResponseStreamEvent] = []
    for event in stream:
        seen.append(event)
        if len(seen) == after:
            break
    stream.close()
    first = seen[0]
    assert first.type == "response.created"
    assert ai.responses.retrieve(first.response.id).status == "in_progress"
    rest = list(
        ai.responses.retrieve(
            first.response.id, stream=True, starting_after=seen[-1].sequence_number
        )
    )
    assert rest[-1].type == "response.completed"
    assert deltas(seen + rest) == STORY
    assert sum(event.type == "response.output_text.delta" for event in rest) > 1


# In the background, and cancelled


def test_a_background_response_runs_by_itself(ai: OpenAI) -> None:
    created = ai.responses.create(input=SLOW, background=True)
    assert created.status in ("queued", "in_progress")
    assert created.background
    done = eventually(
        lambda: r if (r := ai.responses.retrieve(created.id)).status == "completed" else None,
        what="the response is completed",
    )
    assert done is not None
    assert done.output_text == STORY


def test_a_background_response_can_be_streamed(ai: OpenAI) -> None:
    stream = ai.responses.create(input=SLOW, background=True, stream=True)
    first = next(iter(stream))
    stream.close()
    assert first.type == "response.created"
    events = list(ai.responses.retrieve(first.response.id, stream=True))
    assert events[0].type == "response.created"
    assert deltas(events) == STORY


def test_a_response_can_be_cancelled_and_cancelled_again(ai: OpenAI) -> None:
    created = ai.responses.create(input=ENDLESS, background=True)
    assert ai.responses.cancel(created.id).status == "cancelled"
    assert ai.responses.cancel(created.id).status == "cancelled"
    assert ai.responses.retrieve(created.id).status == "cancelled"


def test_the_stream_of_a_cancelled_response_ends(ai: OpenAI) -> None:
    events: list[ResponseStreamEvent] = []
    for event in ai.responses.create(input=ENDLESS, stream=True):
        events.append(event)
        if event.type == "response.output_text.delta" and len(events) < 6:
            ai.responses.cancel(events[0].response.id)  # type: ignore[union-attr]
    last = events[-1]
    assert last.type == "response.incomplete"
    assert last.response.status == "cancelled"
    assert last.response.output_text == deltas(events)


def test_a_finished_response_cannot_be_cancelled(ai: OpenAI) -> None:
    created = ai.responses.create(input="hi")
    with pytest.raises(openai.BadRequestError, match="nothing to cancel"):
        ai.responses.cancel(created.id)


# Conversations


def test_the_latest_response_continues_its_session(ai: OpenAI) -> None:
    first = ai.responses.create(input="My name is Ada.")
    second = ai.responses.create(input="What is my name?", previous_response_id=first.id)
    assert second.output_text == "Your name is Ada."
    assert session_of(second) == session_of(first)
    assert ai.responses.retrieve(second.id).previous_response_id == first.id


def test_an_older_response_begins_a_session_that_knows_what_came_until_then(
    ai: OpenAI, system: System
) -> None:
    first = ai.responses.create(input="My name is Ada.")
    ai.responses.create(input="My name is Bob.", previous_response_id=first.id)
    fork = ai.responses.create(input="What is my name?", previous_response_id=first.id)
    assert fork.output_text == "Your name is Ada."
    assert session_of(fork) != session_of(first)
    goes_on = ai.responses.create(input="What is my name?", previous_response_id=fork.id)
    assert session_of(goes_on) == session_of(fork)
    for response in (first, fork):
        system.assert_journal_sound(session_of(response))


def test_a_conversation_keeps_its_responses_and_shows_its_items(ai: OpenAI) -> None:
    conversation = ai.conversations.create(metadata={"topic": "names"})
    assert conversation.id.startswith("conv_")
    ai.responses.create(input="My name is Ada.", conversation=conversation.id)
    answer = ai.responses.create(input="What is my name?", conversation={"id": conversation.id})
    assert answer.output_text == "Your name is Ada."
    assert answer.conversation is not None
    assert answer.conversation.id == conversation.id

    pages = ai.conversations.items.list(conversation.id, order="asc", limit=3)
    items = list(pages)
    assert [(item.role, item.content[0].text) for item in items] == [  # type: ignore[union-attr]
        ("user", "My name is Ada."),
        ("assistant", "Nice to meet you, Ada. Ask me for your name whenever you like."),
        ("user", "What is my name?"),
        ("assistant", "Your name is Ada."),
    ]
    assert list(ai.conversations.items.list(conversation.id, order="desc")) == items[::-1]
    for item in items:
        assert item.id is not None
        one = ai.conversations.items.retrieve(item.id, conversation_id=conversation.id)
        assert one == item

    changed = ai.conversations.update(conversation.id, metadata={"topic": "changed"})
    assert ai.conversations.retrieve(conversation.id) == changed
    assert ai.conversations.delete(conversation.id).deleted
    with pytest.raises(openai.NotFoundError):
        ai.conversations.retrieve(conversation.id)


def test_messages_wait_for_their_turn_in_a_busy_conversation(ai: OpenAI) -> None:
    conversation = ai.conversations.create().id
    # Long enough for the stream behind it to say that it waits.
    asked = script(STORY, tokens=12, tps=6)
    ai.responses.create(conversation=conversation, input=asked, background=True)
    events = list(ai.responses.create(conversation=conversation, input="next", stream=True))
    assert [event.type for event in events[:3]] == [
        "response.created",
        "response.queued",
        "response.in_progress",
    ]
    assert events[-1].type == "response.completed"
    items = list(ai.conversations.items.list(conversation, order="asc"))
    assert items[1].content[0].text == STORY  # type: ignore[union-attr]
    assert items[2].content[0].text == "next"  # type: ignore[union-attr]


def test_the_same_idempotency_key_gives_the_same_response(ai: OpenAI) -> None:
    headers = {"Idempotency-Key": uuid.uuid4().hex}
    first = ai.responses.create(input="hi", extra_headers=headers)
    assert ai.responses.create(input="hi", extra_headers=headers) == first


def test_what_was_put_into_a_response_is_listed(ai: OpenAI) -> None:
    created = ai.responses.create(
        input=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        ]
    )
    listed = list(ai.responses.input_items.list(created.id, limit=1, order="asc"))
    assert [(item.role, item.content[0].text) for item in listed] == [  # type: ignore[union-attr]
        ("system", "Be brief."),
        ("user", "hi"),
    ]


# The rest


def test_chat_completions_answer_the_whole_conversation_that_they_are_given(ai: OpenAI) -> None:
    messages: Any = [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Hello, Ada."},
        {"role": "user", "content": "What is my name?"},
    ]
    answer = ai.chat.completions.create(model="assistant", messages=messages)
    assert answer.choices[0].message.content == "Your name is Ada."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0


def test_chat_completions_stream(ai: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": SLOW}]
    chunks = list(
        ai.chat.completions.create(
            model="simulator",
            messages=messages,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == STORY
    assert sum(map(bool, texts)) > 3
    assert chunks[-1].usage is not None


def test_agents_and_models_are_listed(ai: OpenAI) -> None:
    listed = list(ai.models.list())
    assert [(model.id, model.owned_by) for model in listed] == [
        ("assistant", "agents"),
        ("tooled", "agents"),
        ("embedder", "models"),
        ("simulator", "models"),
    ]
    assert [ai.models.retrieve(model.id) for model in listed] == listed


def test_errors_are_of_openais_classes(ai: OpenAI) -> None:
    created = ai.responses.create(input="hi")
    session = session_of(created)
    unknown = f"resp_{'0' * 26}_{session}"

    def refused(kind: type[openai.APIStatusError], code: str, call: Any, **given: Any) -> None:
        with pytest.raises(kind) as caught:
            call(**given)
        assert caught.value.code == code, caught.value

    create, retrieve = ai.responses.create, ai.responses.retrieve
    refused(openai.NotFoundError, "model_not_found", create, model="gpt-99", input="hi")
    refused(openai.NotFoundError, "session_not_found", create, conversation="nobody", input="hi")
    refused(openai.NotFoundError, "turn_not_found", retrieve, response_id=unknown)
    refused(openai.BadRequestError, "invalid_request", retrieve, response_id="resp_what")
    refused(openai.BadRequestError, "unsupported_parameter", create, input="hi", store=False)
    refused(openai.BadRequestError, "invalid_request", create, input=[])
    key = {"Idempotency-Key": uuid.uuid4().hex}
    create(input="hi", extra_headers=key)
    conflict = {"input": "something else", "extra_headers": key}
    refused(openai.ConflictError, "idempotency_conflict", create, **conflict)
    with pytest.raises(openai.APIStatusError) as caught:
        create(input="x" * (5 * 1024 * 1024))
    assert (caught.value.status_code, caught.value.code) == (413, "body_too_large")
    messages: Any = [{"role": "user", "content": '!sim {"status": 503}'}]
    with pytest.raises(openai.InternalServerError) as failed:
        ai.chat.completions.create(model="simulator", messages=messages)
    assert failed.value.code == "model_unavailable"


def test_a_failed_response_says_why(ai: OpenAI) -> None:
    response = ai.responses.create(input='!sim {"status": 429}')
    assert response.status == "failed"
    assert response.error is not None
    assert response.error.code == "rate_limit_exceeded"


# Its own retries


@pytest.mark.parametrize(
    ("where", "stream"),
    [("new", False), ("new", True), ("conversation", False), ("latest", True), ("older", False)],
)
def test_its_own_retries_double_no_turn(
    ai: OpenAI, system: System, where: str, stream: bool
) -> None:
    given: dict[str, Any] = {}
    if where == "conversation":
        given["conversation"] = ai.conversations.create().id
    if where in ("latest", "older"):
        first = ai.responses.create(input="one")
        given["previous_response_id"] = first.id
    if where == "older":
        ai.responses.create(input="two", previous_response_id=first.id)
    text = f"{STORY} {uuid.uuid4().hex}"
    with (
        # The first answer is lost as it begins, the second within its head.
        CuttingProxy(system.port, cuts=[0, 40]) as proxy,
        OpenAI(base_url=f"{proxy.url}/v1", api_key="none", max_retries=2) as client,
    ):
        asked = script(text, tokens=12, tps=20)
        if stream:
            events = list(client.responses.create(input=asked, stream=True, **given))
            assert deltas(events) == text
            last = events[-1]
            assert last.type == "response.completed"
            response = last.response
        else:
            response = client.responses.create(input=asked, **given)
    assert response.output_text == text
    assert proxy.connections == 3
    turns = system.sql(
        "SELECT session_id FROM events WHERE body::json->>'type' = 'turn.accepted'"
        " AND body::text LIKE %s",
        f"%{json.dumps(text)[1:-1]}%",
    )
    assert turns == [(session_of(response),)]
    system.assert_journal_sound(session_of(response))
