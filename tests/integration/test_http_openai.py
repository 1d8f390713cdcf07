"""The openai package, unmodified, against a running system: ``base_url`` is where it is."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from agentray.client.http import Client
from tests.integration.unreliable import unreliable

SCRIPT = {"text": "One two three four five six seven eight nine ten", "tokens": 10}
SLOW = SCRIPT | {"tps": 20}


def sim(**script: Any) -> str:
    return "!sim " + json.dumps(script)


@pytest.fixture
def ai(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{base_url}/v1", api_key="unused", timeout=60.0) as client:
        yield client


def deltas(events: list[Any]) -> str:
    return "".join(e.delta for e in events if e.type == "response.output_text.delta")


def test_a_response_is_created_retrieved_and_continued(ai: openai.OpenAI) -> None:
    first = ai.responses.create(model="assistant", input="hello", metadata={"k": "v"})
    assert first.status == "completed"
    assert first.output_text.startswith("You said: hello")
    assert first.usage is not None
    assert first.usage.output_tokens > 0
    assert ai.responses.retrieve(first.id) == first
    second = ai.responses.create(input="again", previous_response_id=first.id)
    assert "message 2" in second.output_text or "second" in second.output_text
    assert ai.responses.retrieve(second.id).previous_response_id == first.id


def test_an_older_response_is_continued_in_a_session_of_its_own(ai: openai.OpenAI) -> None:
    first = ai.responses.create(input="one")
    second = ai.responses.create(input="two", previous_response_id=first.id)
    aside = ai.responses.create(input="two, otherwise", previous_response_id=first.id)
    # Both are the second message of their sessions.
    shown = [r.output_text.partition("That is")[2] for r in (second, aside)]
    assert shown[0] == shown[1]
    session_of = [r.id[len("resp_") + 27 :] for r in (first, second, aside)]
    assert session_of[0] == session_of[1] != session_of[2]
    third = ai.responses.create(input="three", previous_response_id=second.id)
    assert third.id.endswith(session_of[0])


def test_a_stream_can_be_resumed_behind_each_of_its_events(ai: openai.OpenAI) -> None:
    with ai.responses.create(model="assistant", input=sim(**SCRIPT), stream=True) as stream:
        events = list(stream)
    response = events[-1].response  # type: ignore[union-attr]
    assert events[-1].type == "response.completed"
    assert deltas(events) == response.output_text == SCRIPT["text"]
    for cut, event in enumerate(events[:-1], start=1):
        with ai.responses.retrieve(
            response.id, stream=True, starting_after=event.sequence_number
        ) as rest:
            resumed = list(rest)
        assert deltas(events[:cut]) + deltas(resumed) == response.output_text
        assert [e.type for e in events[:cut] + resumed if "delta" not in e.type] == [
            e.type for e in events if "delta" not in e.type
        ]


def test_a_stream_that_is_left_goes_on_and_is_taken_up_while_it_runs(ai: openai.OpenAI) -> None:
    with ai.responses.create(input=sim(**SLOW), stream=True) as stream:
        seen = []
        for event in stream:
            seen.append(event)
            if deltas(seen):
                break
    response_id = seen[0].response.id  # type: ignore[union-attr]
    with ai.responses.retrieve(
        response_id, stream=True, starting_after=seen[-1].sequence_number
    ) as rest:
        resumed = list(rest)
    assert deltas(resumed)
    assert deltas(seen) + deltas(resumed) == SCRIPT["text"]


def test_the_streaming_helper_gives_the_final_response(ai: openai.OpenAI) -> None:
    with ai.responses.stream(model="assistant", input=sim(**SCRIPT)) as stream:
        stream.until_done()
        response = stream.get_final_response()
    assert response.output_text == SCRIPT["text"]


def test_a_background_response_is_polled_until_it_is_done(ai: openai.OpenAI) -> None:
    response = ai.responses.create(input=sim(**SCRIPT), background=True)
    assert response.background
    while response.status in ("queued", "in_progress"):
        response = ai.responses.retrieve(response.id)
    assert (response.status, response.output_text) == ("completed", SCRIPT["text"])


def test_a_response_is_cancelled_once_and_keeps_what_was_said(ai: openai.OpenAI) -> None:
    with ai.responses.create(input=sim(**SLOW), stream=True) as stream:
        events = []
        for event in stream:
            events.append(event)
            if event.type == "response.output_text.delta":
                cancelled = ai.responses.cancel(event.item_id and events[0].response.id)  # type: ignore[union-attr]
    assert cancelled.status == "cancelled"
    assert events[-1].response.status == "cancelled"  # type: ignore[union-attr]
    assert cancelled.output_text == deltas(events)
    assert SCRIPT["text"].startswith(cancelled.output_text)
    assert ai.responses.cancel(cancelled.id) == cancelled


def test_what_has_ended_cannot_be_cancelled(ai: openai.OpenAI) -> None:
    response = ai.responses.create(input="hi")
    with pytest.raises(openai.BadRequestError, match="nothing to cancel"):
        ai.responses.cancel(response.id)


def test_tools_that_ran_are_shown_and_not_asked_of_the_client(ai: openai.OpenAI) -> None:
    calls = [{"name": "echo", "arguments": {"text": text}} for text in ("a", "b")]
    script = sim(tools=calls, parallel=True, text="said {tool_results}")
    response = ai.responses.create(model="assistant", input=script)
    kinds = [item.type for item in response.output]
    assert kinds == ["mcp_call", "mcp_call", "message"]
    shown = [(item.name, item.status, item.output) for item in response.output[:2]]  # type: ignore[union-attr]
    assert shown == [("echo", "completed", "a"), ("echo", "completed", "b")]
    with ai.responses.create(model="assistant", input=script, stream=True) as stream:
        events = list(stream)
    assert [item.type for item in events[-1].response.output] == kinds  # type: ignore[union-attr]


def test_a_model_that_fails_fails_the_response_and_not_the_request(ai: openai.OpenAI) -> None:
    response = ai.responses.create(input=sim(status=400))
    assert response.status == "failed"
    assert response.error is not None
    assert response.error.code == "server_error"


def test_a_conversation_is_kept_and_listed(ai: openai.OpenAI) -> None:
    conversation = ai.conversations.create(metadata={"topic": "x"})
    for text in ("one", "two"):
        response = ai.responses.create(conversation=conversation.id, input=text)
        assert response.conversation is not None
        assert response.conversation.id == conversation.id
    items = list(ai.conversations.items.list(conversation.id, order="asc", limit=3))
    assert [item.role for item in items] == ["user", "assistant"] * 2  # type: ignore[union-attr]
    assert list(ai.conversations.items.list(conversation.id)) == items[::-1]
    item = ai.conversations.items.retrieve(items[0].id or "", conversation_id=conversation.id)
    assert item == items[0]
    inputs = list(ai.responses.input_items.list(response.id))
    assert [item.content[0].text for item in inputs] == ["two"]  # type: ignore[union-attr]
    ai.conversations.update(conversation.id, metadata={"topic": "y"})
    assert ai.conversations.retrieve(conversation.id).metadata == {"topic": "y"}
    ai.conversations.delete(conversation.id)
    with pytest.raises(openai.NotFoundError):
        ai.conversations.retrieve(conversation.id)


def test_messages_wait_for_their_turn_in_a_busy_conversation(ai: openai.OpenAI) -> None:
    conversation = ai.conversations.create().id
    ai.responses.create(conversation=conversation, input=sim(**SLOW), background=True)
    with ai.responses.create(conversation=conversation, input="next", stream=True) as stream:
        events = list(stream)
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    items = list(ai.conversations.items.list(conversation, order="asc"))
    assert [item.role for item in items] == ["user", "assistant"] * 2  # type: ignore[union-attr]
    assert items[1].content[0].text == SCRIPT["text"]  # type: ignore[union-attr]


def test_a_completion_is_stateless(ai: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": sim(**SCRIPT)}]
    whole = ai.chat.completions.create(model="assistant", messages=messages)
    assert whole.choices[0].message.content == SCRIPT["text"]
    with ai.chat.completions.create(model="assistant", messages=messages, stream=True) as chunks:
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == SCRIPT["text"]


def test_agents_and_models_are_models(ai: openai.OpenAI) -> None:
    names = [model.id for model in ai.models.list()]
    assert "assistant" in names
    assert ai.models.retrieve(names[-1]).id == names[-1]


@pytest.mark.parametrize(
    ("body", "error", "code"),
    [
        ({"model": "nobody"}, openai.NotFoundError, "model_not_found"),
        ({"store": False}, openai.BadRequestError, "unsupported_parameter"),
        ({"conversation": "no-such-one"}, openai.NotFoundError, "session_not_found"),
        ({"previous_response_id": "resp_odd"}, openai.BadRequestError, "invalid_request"),
        ({"max_output_tokens": 0}, openai.BadRequestError, "invalid_request"),
    ],
)
def test_a_bad_request_is_refused_with_its_code(
    ai: openai.OpenAI, body: dict[str, Any], error: type[openai.APIStatusError], code: str
) -> None:
    with pytest.raises(error) as caught:
        ai.responses.create(input="hi", **body)
    assert caught.value.code == code


def test_the_same_idempotency_key_gives_the_same_response(ai: openai.OpenAI) -> None:
    headers = {"Idempotency-Key": uuid.uuid4().hex}
    first = ai.responses.create(input="hi", extra_headers=headers)
    assert ai.responses.create(input="hi", extra_headers=headers).id == first.id
    with pytest.raises(openai.ConflictError) as caught:
        ai.responses.create(input="something else", extra_headers=headers)
    assert caught.value.code == "idempotency_conflict"


@pytest.mark.parametrize("where", ["new", "conversation"])
@pytest.mark.parametrize("lost_bytes", [0, 40])
def test_its_own_retries_double_no_turn(
    base_url: str, ai: openai.OpenAI, where: str, lost_bytes: int
) -> None:
    user = f"user-{uuid.uuid4().hex}"
    given: dict[str, Any] = {"user": user}
    if where == "conversation":
        given["conversation"] = ai.conversations.create().id
    with (
        unreliable(base_url, lambda n: lost_bytes if n < 2 else None) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="unused", timeout=60.0) as losing,
    ):
        response = losing.responses.create(input="hello", **given)
    assert response.status == "completed"
    with Client(base_url) as client:
        if where == "new":
            (info,) = client.sessions.list(user=user).data
        else:
            info = client.sessions.get(given["conversation"])
    assert info.turns == 1
    assert response.id.endswith(info.id)
