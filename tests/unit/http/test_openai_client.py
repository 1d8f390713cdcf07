"""The openai package, unmodified, against the door; the sessions behind it are in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx2
import openai
import pydantic
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from agentray.clock import ManualClock
from agentray.errors import BackpressureError
from tests.unit.http.memory import MemorySessions


async def nobody(scope: Scope, receive: Receive, send: Send) -> None:
    """Take a request in, and do nothing."""


class Connection:
    """Takes what is sent, as uvicorn's does; one whose client has left, too."""

    def __init__(self, disconnected: bool) -> None:
        self.disconnected = disconnected

    async def send(self, message: Any) -> None: ...


class LosesAnswers:
    """Says 502 in the place of the first ``lost`` answers, of ``before``; then it serves.

    Those are lost behind the server's connection, or with ``gone`` by a client that left it.
    """

    def __init__(
        self, app: ASGIApp, *, lost: int, before: ASGIApp | None = None, gone: bool = False
    ) -> None:
        self.gone = gone
        self.app = app
        self.before = before or app
        self.lost = lost
        self.counts: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        self.counts.append(headers.get(b"x-stainless-retry-count", b"").decode())
        if not self.lost:
            await self.app(scope, receive, send)
            return
        self.lost -= 1
        await self.before(scope, receive, Connection(self.gone).send)
        head = [(b"content-length", b"0"), (b"retry-after-ms", b"1")]
        await send({"type": "http.response.start", "status": 502, "headers": head})
        await send({"type": "http.response.body", "body": b""})


def connect(app: Any) -> openai.AsyncOpenAI:
    transport = httpx2.ASGITransport(app=app)
    return openai.AsyncOpenAI(
        base_url="http://door/v1",
        api_key="key",
        http_client=httpx2.AsyncClient(transport=transport),
    )


@pytest.fixture
async def ai(app: ASGIApp) -> AsyncIterator[openai.AsyncOpenAI]:
    async with connect(app) as client:
        yield client


async def test_a_response_is_created_and_retrieved(ai: openai.AsyncOpenAI) -> None:
    created = await ai.responses.create(model="assistant", input="hi", metadata={"a": "b"})
    assert created.output_text == "Hello"
    assert created.usage is not None
    assert created.usage.total_tokens == 5
    assert created.metadata == {"a": "b"}
    assert await ai.responses.retrieve(created.id) == created


async def test_a_response_is_streamed_and_resumed(ai: openai.AsyncOpenAI) -> None:
    async with ai.responses.stream(model="assistant", input="hi") as stream:
        events = [event async for event in stream]
        response = await stream.get_final_response()
    assert response.output_text == "Hello"
    first = next(e for e in events if e.type == "response.output_text.delta")
    assert first.delta == "Hel"
    rest = await ai.responses.retrieve(
        response.id, stream=True, starting_after=first.sequence_number
    )
    deltas = [e.delta async for e in rest if e.type == "response.output_text.delta"]
    assert deltas == ["lo"]


async def test_a_background_response_answers_at_once_and_can_be_cancelled(
    ai: openai.AsyncOpenAI, sessions: MemorySessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions.hold = True
    monkeypatch.setattr("agentray.http.routes_responses._CANCEL_WAIT_S", 0.01)
    created = await ai.responses.create(model="tiny", input="hi", background=True)
    assert (created.status, created.background, created.model) == ("in_progress", True, "tiny")
    await ai.responses.cancel(created.id)
    assert sessions.cancelled == list(sessions.turns)
    sessions.finish(sessions.cancelled[0])
    with pytest.raises(openai.BadRequestError, match="nothing to cancel"):
        await ai.responses.cancel(created.id)


class Word(pydantic.BaseModel):
    word: str


async def test_an_answer_in_a_form_is_asked_for_and_read(
    ai: openai.AsyncOpenAI, sessions: MemorySessions
) -> None:
    sessions.chunks = ['{"word": ', '"hi"}']
    parsed = await ai.responses.parse(input="x", text_format=Word)
    assert parsed.output_parsed == Word(word="hi")
    (turn,) = sessions.turns.values()
    assert turn.options.output_schema is not None
    assert turn.options.output_schema["required"] == ["word"]
    assert turn.options.output_form == {"name": "Word", "strict": True}
    schema: dict[str, object] = {"type": "object"}
    created = await ai.responses.create(
        input="x", text={"format": {"type": "json_schema", "name": "any", "schema": schema}}
    )
    assert created.text is not None
    assert created.text.format is not None
    assert created.text.format.type == "json_schema"
    assert (created.text.format.name, created.text.format.schema_) == ("any", schema)
    retrieved = await ai.responses.retrieve(created.id)
    assert retrieved.text == created.text


async def test_a_fallback_in_the_stream_does_not_disturb_the_package(
    ai: openai.AsyncOpenAI, sessions: MemorySessions
) -> None:
    sessions.breaks_off = True
    async with ai.responses.stream(model="assistant", input="hi") as stream:
        events = [event async for event in stream]
        final = await stream.get_final_response()
    told: list[Any] = [event for event in events if "fallback" in event.type]
    assert [(event.reason, event.to_model) for event in told] == [("model_unavailable", "n")]
    statuses = [item.status for item in final.output if item.type == "message"]
    assert statuses == ["incomplete", "completed"]
    kinds = [event.type async for event in await ai.responses.create(input="hi", stream=True)]
    assert kinds.count(told[0].type) == 1
    assert kinds[-1] == "response.completed"


async def test_the_latest_response_continues_its_session_and_an_older_one_forks_it(
    ai: openai.AsyncOpenAI, sessions: MemorySessions
) -> None:
    first = await ai.responses.create(input="one")
    second = await ai.responses.create(input="two", previous_response_id=first.id)
    assert len(sessions.sessions) == 1
    assert second.previous_response_id == first.id
    assert (await ai.responses.retrieve(second.id)).previous_response_id == first.id
    other = await ai.responses.create(input="three", previous_response_id=first.id)
    assert len(sessions.sessions) == 2
    assert other.id.rpartition("sess_")[2] != first.id.rpartition("sess_")[2]


async def test_a_conversation_has_the_items_of_its_turns(ai: openai.AsyncOpenAI) -> None:
    conversation = await ai.conversations.create(metadata={"a": "b"})
    for text in ("one", "two", "three"):
        image: Any = {"type": "input_image", "image_url": "http://i", "detail": "low"}
        content: Any = [{"type": "input_text", "text": text}, image]
        response = await ai.responses.create(
            conversation=conversation.id, input=[{"role": "user", "content": content}]
        )
        assert response.conversation is not None
        assert response.conversation.id == conversation.id

    async def read(order: Any) -> list[Any]:
        # The pages follow each other by themselves.
        pages = ai.conversations.items.list(conversation.id, limit=4, order=order)
        return [item async for item in pages]

    ascending = await read("asc")
    texts = [item.content[0].text for item in ascending]
    assert texts == ["one", "Hello", "two", "Hello", "three", "Hello"]
    assert ascending[0].content[1].image_url == "http://i"
    assert await read("desc") == ascending[::-1]
    for item in ascending:
        assert item == await ai.conversations.items.retrieve(
            item.id, conversation_id=conversation.id
        )
    changed = await ai.conversations.update(conversation.id, metadata={"c": "d"})
    assert await ai.conversations.retrieve(conversation.id) == changed
    assert (await ai.conversations.delete(conversation.id)).deleted
    with pytest.raises(openai.NotFoundError):
        await ai.conversations.retrieve(conversation.id)


async def test_what_was_put_into_a_response_is_listed(ai: openai.AsyncOpenAI) -> None:
    created = await ai.responses.create(
        input=[{"role": "developer", "content": "rules"}, {"role": "user", "content": "hi"}]
    )
    listed = [item async for item in ai.responses.input_items.list(created.id, limit=1)]
    assert [(item.role, item.content[0].text) for item in listed] == [  # type: ignore[union-attr]
        ("user", "hi"),
        ("system", "rules"),
    ]


async def test_agents_and_models_are_models(ai: openai.AsyncOpenAI) -> None:
    listed = [model async for model in ai.models.list()]
    assert [await ai.models.retrieve(model.id) for model in listed] == listed


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("where", ["new", "conversation", "latest", "older"])
async def test_its_own_retries_double_no_turn(
    app: ASGIApp, ai: openai.AsyncOpenAI, sessions: MemorySessions, where: str, gone: bool
) -> None:
    given: dict[str, Any] = {}
    if where == "conversation":
        given["conversation"] = (await ai.conversations.create()).id
    if where in ("latest", "older"):
        first = await ai.responses.create(input="one")
        given["previous_response_id"] = first.id
    if where == "older":
        await ai.responses.create(input="two", previous_response_id=first.id)
    # The very same was asked before, and answered: that is another request.
    asked_before = await ai.responses.create(input="hi", **given)
    if where == "latest":
        given["previous_response_id"] = asked_before.id
    before = set(sessions.turns)
    losing = LosesAnswers(app, lost=2, gone=gone)
    async with connect(losing) as client:
        response = await client.responses.create(input="hi", **given)
    assert losing.counts == ["0", "1", "2"]
    (made,) = set(sessions.turns) - before
    assert made in response.id


async def test_a_retry_of_what_never_arrived_is_not_taken_for_an_earlier_request(
    app: ASGIApp, ai: openai.AsyncOpenAI, clock: ManualClock
) -> None:
    conversation = await ai.conversations.create()
    first = await ai.responses.create(input="go on", conversation=conversation.id)
    clock.advance(3)
    losing = LosesAnswers(app, lost=1, before=nobody)
    async with connect(losing) as client:
        second = await client.responses.create(input="go on", conversation=conversation.id)
    assert second.id != first.id


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("where", ["new", "conversation"])
async def test_a_retry_of_what_was_refused_here_is_not_taken_for_an_earlier_request(
    app: ASGIApp,
    ai: openai.AsyncOpenAI,
    sessions: MemorySessions,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    stream: bool,
) -> None:
    given: dict[str, Any] = {"input": "go on", "stream": stream}
    if where == "conversation":
        given["conversation"] = (await ai.conversations.create()).id
    for _ in range(2):  # whose turns all look the same
        await ask(ai, given)
    submit = sessions.submit

    async def full(*_: Any, **__: Any) -> None:
        monkeypatch.setattr(sessions, "submit", submit)
        raise BackpressureError("full", retry_after_s=0.001)

    monkeypatch.setattr(sessions, "submit", full)
    serving = LosesAnswers(app, lost=0)
    async with connect(serving) as client:
        await ask(client, given)
    assert serving.counts == ["0", "1"]
    assert len(sessions.turns) == 3


async def ask(ai: openai.AsyncOpenAI, given: dict[str, Any]) -> None:
    answer = await ai.responses.create(**given)
    if given["stream"]:
        assert [event.type async for event in answer][-1] == "response.completed"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("waited_s", "turns"), [(9.0, 1), (11.0, 2)])
async def test_a_turn_that_ended_while_its_client_was_gone_is_found_for_ten_seconds(
    app: ASGIApp,
    sessions: MemorySessions,
    clock: ManualClock,
    waited_s: float,
    turns: int,
    stream: bool,
) -> None:
    async def late(scope: Scope, receive: Receive, send: Send) -> None:
        await app(scope, receive, send)
        clock.advance(waited_s)

    losing = LosesAnswers(app, lost=1, before=late, gone=True)
    async with connect(losing) as client:
        await ask(client, {"input": "hi", "stream": stream})
    assert len(sessions.turns) == turns


async def test_what_was_sent_to_a_conversation_is_looked_for_nowhere_else(
    app: ASGIApp, ai: openai.AsyncOpenAI, sessions: MemorySessions
) -> None:
    conversation = await ai.conversations.create()
    losing = LosesAnswers(app, lost=1, before=nobody)
    async with connect(losing) as client:
        await client.responses.create(input="hi", conversation=conversation.id)
    assert losing.counts == ["0", "1"]
    assert (len(sessions.turns), sessions.listed) == (1, 0)


async def test_a_refusal_of_what_was_accepted_never_is_not_retried_into_a_turn(
    ai: openai.AsyncOpenAI, sessions: MemorySessions
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await ai.responses.create(input="hi", store=False)
    assert caught.value.code == "unsupported_parameter"
    assert caught.value.param == "store"
    assert not sessions.turns


async def test_an_idempotency_key_of_the_caller_gives_the_same_response(
    ai: openai.AsyncOpenAI, sessions: MemorySessions
) -> None:
    headers = {"Idempotency-Key": "k1"}
    first = await ai.responses.create(input="hi", extra_headers=headers)
    again = await ai.responses.create(input="hi", extra_headers=headers)
    assert first.id == again.id
    await ai.responses.create(input="on", previous_response_id=first.id)
    forked = [
        await ai.responses.create(
            input="aside", previous_response_id=first.id, extra_headers={"Idempotency-Key": "k2"}
        )
        for _ in range(2)
    ]
    assert forked[0].id == forked[1].id
    assert len(sessions.turns) == 3
