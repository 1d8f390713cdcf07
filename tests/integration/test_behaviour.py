"""How a session behaves, over HTTP: the same in a shared host, in a process of its own, and
whichever host a request comes to."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.followed_turn import echo, script
from tests.integration.wire import Event, Session, eventually, read_sse, texts_of
from tests.system import System

STORY = "Once upon a time an actor kept a journal of all that it did."
SLOW = script(STORY, tokens=12, tps=20)
ENDLESS = script("never read to its end", tokens=10_000, tps=10)


@pytest.fixture(params=["shared", "dedicated", "scattered"])
def way(request: pytest.FixtureRequest) -> str:
    """A placement; or ``scattered``, where each request comes to any host, not to the owner."""
    return request.param


@pytest.fixture
def placement(way: str) -> str:
    return "dedicated" if way == "dedicated" else "shared"


def _scatter(request: httpx.Request) -> None:
    # This header decides before the path does.
    request.headers["x-session-id"] = uuid.uuid4().hex


@pytest.fixture
def http(http: httpx.Client, way: str) -> Iterator[httpx.Client]:
    if way != "scattered":
        yield http
        return
    hooks = {"request": [_scatter]}
    with httpx.Client(base_url=http.base_url, timeout=60, event_hooks=hooks) as client:
        yield client


@pytest.fixture
def session(system: System, http: httpx.Client, placement: str) -> Iterator[Session]:
    """A new session. Whatever a test does with it, its journal is sound at the end."""
    session = Session.make(http, placement=placement)
    yield session
    found = http.get(session.path)
    if found.status_code == 404:
        return
    if found.json()["status"] == "running":
        session.cancel()
        eventually(lambda: session.info()["status"] != "running", what="the session is idle")
    system.assert_journal_sound(session.id)


# Sessions


def test_an_existing_id_is_answered_with_its_session(http: httpx.Client, placement: str) -> None:
    session_id = f"t-{uuid.uuid4().hex}"
    body = {"id": session_id, "placement": placement, "user": "ada", "metadata": {"a": "1"}}
    first = http.post("/v1/sessions", json=body)
    again = http.post("/v1/sessions", json={"id": session_id, "user": "bob"})
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() == first.json() == http.get(f"/v1/sessions/{session_id}").json()
    facts = {key: first.json()[key] for key in (*body, "agent", "tenant", "status", "last_seq")}
    assert facts == {
        **body,
        "agent": "assistant",
        "tenant": "default",
        "status": "idle",
        "last_seq": 0,
    }


def test_a_session_without_an_id_gets_one(http: httpx.Client, placement: str) -> None:
    answers = [http.post("/v1/sessions", json={"placement": placement}) for _ in range(2)]
    ids = {answer.json()["id"] for answer in answers}
    assert [answer.status_code for answer in answers] == [201, 201]
    assert len(ids) == 2
    assert all(session_id.startswith("sess_") for session_id in ids)


def test_sessions_are_listed_by_what_they_are_and_in_pages(
    http: httpx.Client, placement: str
) -> None:
    user = f"user-{uuid.uuid4().hex}"
    made = [Session.make(http, user=user, placement=placement).id for _ in range(5)]
    other = Session.make(http, user="somebody else", placement=placement)
    running = Session(http, made[0])
    turn_id = running.begin(ENDLESS)

    def listed(**query: Any) -> list[str]:
        return [one["id"] for one in http.get("/v1/sessions", params=query).json()["data"]]

    assert listed(user=user) == made[::-1], "newest first"
    assert listed(user=user, status="running") == made[:1]
    assert listed(user=user, status="idle") == made[:0:-1]
    assert listed(user=user, agent="nobody") == []
    assert other.id in listed(agent="assistant", limit=100)

    pages = [http.get("/v1/sessions", params={"user": user, "limit": 2}).json()]
    while pages[-1]["has_more"]:
        query = {"user": user, "limit": 2, "after": pages[-1]["next"]}
        pages.append(http.get("/v1/sessions", params=query).json())
    assert [len(page["data"]) for page in pages] == [2, 2, 1]
    assert [one["id"] for page in pages for one in page["data"]] == made[::-1]
    assert pages[-1]["next"] is None
    running.cancel(turn_id)
    assert running.ended(turn_id)["status"] == "cancelled"


def test_a_session_whose_time_is_over_takes_no_turn_and_can_still_be_read(
    http: httpx.Client, placement: str
) -> None:
    session = Session.make(http, placement=placement, ttl_s=1.5, user="mayfly")
    assert session.info()["expires_at"] == pytest.approx(time.time() + 1.5, abs=1)
    # This one goes on beyond the end of the session's time.
    turn_id = session.begin(script(STORY, tokens=30, tps=15))
    eventually(lambda: time.time() > session.info()["expires_at"], what="its time is over")
    closed = session.post("too late")
    assert closed.status_code == 409
    assert closed.json()["error"]["code"] == "session_closed"

    assert session.ended(turn_id)["text"] == STORY
    assert session.info()["status"] == "closed"
    listed = http.get("/v1/sessions", params={"user": "mayfly", "status": "closed"}).json()
    assert session.id in [one["id"] for one in listed["data"]]
    events = session.events()
    assert [event["type"] for event in events if event["turn_id"] == turn_id][-1] == "turn.finished"
    assert http.delete(session.path).status_code == 200
    assert http.get(session.path).status_code == 404


def test_only_delete_deletes(session: Session, http: httpx.Client, placement: str) -> None:
    session.turn("My name is Ada.")
    with session.stream(ENDLESS) as stream:
        turn_id = next(stream).data["turn_id"]
        answer = http.delete(session.path)
        assert answer.json() == {"id": session.id, "object": "session.deleted", "deleted": True}
        last = list(stream)[-1]
        assert (last.name, last.data["error"]["code"]) == ("error", "session_not_found")
    for gone in (
        http.get(session.path),
        http.get(f"{session.path}/events"),
        http.get(f"{session.path}/turns/{turn_id}"),
        http.delete(session.path),
        session.cancel(),
        session.post("hello?"),
    ):
        assert gone.status_code == 404
        assert gone.json()["error"]["code"] == "session_not_found"

    # The id is free again, and nothing of the old session is left in it.
    assert Session.make(http, id=session.id, placement=placement).info()["last_seq"] == 0
    assert "not told me" in session.turn("What is my name?")["text"]


# Turns


def test_a_session_answers_and_remembers(session: Session) -> None:
    first = session.turn("My name is Ada.")
    assert (first["state"], first["status"]) == ("done", "completed")
    assert first["text"].startswith("Nice to meet you, Ada.")
    assert first["usage"]["output_tokens"] > 0
    again = session.turn("What is my name?")
    assert again["text"] == "Your name is Ada."
    assert session.found(again["id"]) == again
    assert session.info()["turns"] == 2


def test_a_streamed_turn_is_its_journal_and_its_text(session: Session) -> None:
    with session.stream(SLOW) as stream:
        events = list(stream)
    names = [event.name for event in events if event.name != "model.delta"]
    assert names == ["turn.accepted", "model.called", "model.finished", "turn.finished"]
    assert texts_of(events) == [STORY]
    assert sum(event.name == "model.delta" for event in events) > 1
    journal = session.events()
    assert [event.data for event in events if event.name != "model.delta"] == journal
    assert [event["seq"] for event in journal] == [1, 2, 3, 4]
    assert {event["turn_id"] for event in journal} == {events[0].data["turn_id"]}
    assert all(abs(event["at"] - time.time()) < 60 for event in journal)


def test_a_background_turn_runs_without_a_listener(session: Session) -> None:
    answer = session.post(SLOW, background=True)
    assert answer.status_code == 202
    assert answer.json()["state"] in ("accepted", "running")
    done = session.ended(answer.json()["id"])
    assert (done["status"], done["text"]) == ("completed", STORY)


def test_messages_of_many_parts_and_options_reach_the_model(session: Session) -> None:
    parts = [{"type": "text", "text": "My name"}, {"type": "text", "text": " is Grace."}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    turn = session.turn(messages, max_output_tokens=3, metadata={"why": "test"})
    assert turn["status"] == "incomplete"
    assert turn["text"] == "Nice to meet "
    assert turn["options"]["metadata"] == {"why": "test"}
    assert session.events()[0]["input"] == messages
    assert session.turn("What is my name?")["text"] == "Your name is Grace."


def test_a_failed_model_fails_the_turn_and_not_the_session(session: Session) -> None:
    failed = session.turn('!sim {"status": 400}')
    assert failed["status"] == "failed"
    assert failed["error"]["code"] == "model_error"
    assert session.turn("hello")["status"] == "completed"


def test_an_answer_that_breaks_off_is_continued_and_no_text_is_repeated(session: Session) -> None:
    broken = script(STORY, tokens=12, tps=200)[:-1] + ', "fail_after": 5}'
    with session.stream(broken) as stream:
        events = list(stream)
    assert texts_of(events)[-1] == STORY
    assert [event.name for event in events].count("model.voided") >= 1
    assert events[-1].data["status"] == "completed"


# A busy session


def test_messages_to_a_busy_session_wait_in_order(session: Session) -> None:
    first = session.begin(script("one", tps=20, ttft_ms=300))
    others = [session.begin(script(text)) for text in ("two", "three")]
    assert session.found(others[1])["state"] == "accepted"
    assert session.info()["status"] == "running"
    assert session.turn(script("four"))["text"] == "four"
    turns = [session.found(turn_id) for turn_id in (first, *others)]
    assert [turn["text"] for turn in turns] == ["one", "two", "three"]
    accepted = [event for event in session.events() if event["type"] == "turn.accepted"]
    assert [event["turn_id"] for event in accepted[:3]] == [first, *others]


def test_a_busy_session_can_reject(session: Session) -> None:
    turn_id = session.begin(ENDLESS)
    rejected = session.post("now or never", if_busy="reject")
    assert rejected.status_code == 409
    assert rejected.json()["error"]["code"] == "session_busy"
    assert rejected.json()["error"]["type"] == "invalid_request_error"
    session.cancel(turn_id)
    session.ended(turn_id)
    assert session.turn("now", if_busy="reject")["status"] == "completed"
    assert session.info()["turns"] == 2


def test_a_message_can_interrupt(session: Session) -> None:
    running = session.begin(ENDLESS)
    waiting = session.begin("I wait")
    session.streaming(running)
    assert session.turn(script("I am here"), if_busy="interrupt")["text"] == "I am here"
    cut = session.found(running)
    assert cut["status"] == "cancelled"
    assert "never read to its end".startswith(cut["text"].strip()[:5])
    assert session.found(waiting)["state"] == "done"
    assert session.types(running)[-1] == "turn.finished"


# Cancelling


def test_a_running_turn_can_be_cancelled(session: Session) -> None:
    with session.stream(ENDLESS) as stream:
        events: list[Event] = []
        for event in stream:
            events.append(event)
            if event.name == "model.delta" and len(events) < 5:
                turn_id = event.data["turn_id"]
                assert session.cancel(turn_id).json() == {"cancelled": [turn_id]}
    assert events[-1].name == "turn.finished"
    assert events[-1].data["status"] == "cancelled"
    assert session.types(turn_id)[-1] == "turn.finished"
    # What was said stays said; asked for again, it is still true.
    assert session.found(turn_id)["status"] == "cancelled"
    assert session.cancel(turn_id).json() == {"cancelled": [turn_id]}
    assert session.turn("hello")["status"] == "completed"


def test_a_waiting_turn_can_be_cancelled(session: Session) -> None:
    running = session.begin(ENDLESS)
    waiting = session.begin("I wait")
    assert session.cancel(waiting).json() == {"cancelled": [waiting]}
    assert session.found(running)["state"] != "done"
    session.cancel(running)
    ended = session.ended(waiting)
    assert (ended["status"], ended["text"]) == ("cancelled", None)
    assert "model.called" not in session.types(waiting)


def test_all_turns_of_a_session_can_be_cancelled_at_once(session: Session) -> None:
    turns = [session.begin(ENDLESS) for _ in range(3)]
    assert sorted(session.cancel().json()["cancelled"]) == sorted(turns)
    assert [session.ended(turn_id)["status"] for turn_id in turns] == ["cancelled"] * 3


def test_to_cancel_nothing_is_an_error(session: Session) -> None:
    done = session.turn("hello")["id"]
    for answer in (session.cancel(), session.cancel(done)):
        assert answer.status_code == 400
        assert "nothing to cancel" in answer.json()["error"]["message"]
    unknown = session.cancel("0" * 26)
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "turn_not_found")
    assert session.found(done)["status"] == "completed"


# Idempotency keys


@pytest.mark.parametrize("place", ["body", "header"])
def test_the_same_key_gives_the_same_turn(session: Session, place: str) -> None:
    def post(input: str) -> httpx.Response:
        if place == "body":
            return session.post(input, idempotency_key="once")
        return session.post(input, headers={"Idempotency-Key": "once"})

    first, again, other = post("hello"), post("hello"), post("something else")
    assert first.status_code == again.status_code == 200
    assert again.json() == first.json()
    assert other.status_code == 409
    assert other.json()["error"]["code"] == "idempotency_conflict"
    assert other.json()["error"]["details"]["turn_id"] == first.json()["id"]
    assert session.info()["turns"] == 1


def test_one_key_at_the_same_time_makes_one_turn(session: Session) -> None:
    def post(_: int) -> httpx.Response:
        return session.post(script(STORY, tokens=12, tps=100), idempotency_key="at-once")

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(post, range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert {answer.json()["text"] for answer in answers} == {STORY}
    assert session.info()["turns"] == 1


# The journal and its stream


def test_the_journal_comes_in_pages(session: Session) -> None:
    first, second = session.turn("one")["id"], session.turn("two")["id"]
    whole = session.events()
    assert [event["seq"] for event in whole] == list(range(1, 9))
    pages, after = [], 0
    while True:
        page = session.page(after=after, limit=3)
        pages.append(len(page["data"]))
        assert page["data"] == whole[after : after + 3]
        after += len(page["data"])
        if not page["has_more"]:
            break
    assert pages == [3, 3, 2]
    assert session.page(after=8) == {"data": [], "has_more": False}
    assert session.events(turn_id=first) + session.events(turn_id=second) == whole


def test_a_follower_gets_what_it_missed_and_then_what_happens(session: Session) -> None:
    session.turn("before")
    seen: list[Event] = []
    headers = {"Accept": "text/event-stream", "Last-Event-ID": "2.0"}
    with session.http.stream("GET", f"{session.path}/events", headers=headers) as response:
        for event in read_sse(response):
            seen.append(event)
            if event.data["seq"] == 4:
                turn_id = session.begin(script(STORY, tokens=12, tps=100))
            if event.name == "turn.finished" and event.data["seq"] > 4:
                break
    seqs = [event.data["seq"] for event in seen if event.name != "model.delta"]
    assert seqs == [3, 4, 5, 6, 7, 8]
    live = [event for event in seen if event.data["turn_id"] == turn_id]
    assert texts_of(live) == [STORY]
    assert sum(event.name == "model.delta" for event in live) > 1


def test_from_every_cursor_of_a_stream_the_rest_is_exactly_what_was_missing(
    session: Session,
) -> None:
    # One answer breaks off and is continued; tools are in between.
    tools = [echo("a"), echo("b")]
    broken = script("one two three {tool_results}", tokens=8, tps=300, tools=tools)
    broken = broken[:-1] + ', "fail_after": 4}'
    with session.stream(broken) as stream:
        events = list(stream)
    turn_id = events[0].data["turn_id"]
    assert "model.voided" in [event.name for event in events]
    text = "".join(texts_of(events))

    def told(some: list[Event]) -> tuple[list[int], str]:
        seqs = [event.data["seq"] for event in some if event.name != "model.delta"]
        return seqs, "".join(e.data["text"] for e in some if e.name == "model.delta")

    assert told(events)[1] == text
    for cut, event in enumerate(events[:-1], 1):
        rest = list(session.follow(after=event.id, turn_id=turn_id))
        assert told(rest) == told(events[cut:]), f"behind {event.id}, {event.name}"


def test_a_reader_that_comes_late_gets_the_text_so_far(session: Session) -> None:
    turn_id = session.begin(script(STORY, tokens=12, tps=20))
    session.streaming(turn_id)
    events = list(session.follow(turn_id=turn_id))
    assert texts_of(events) == [STORY]
    assert events[0].name == "turn.accepted"
    assert events[-1].name == "turn.finished"


# Tools


def test_tools_run_one_after_another(session: Session) -> None:
    turn = session.turn(script("They said: {tool_results}", tools=[echo("a"), echo("b")]))
    assert turn["text"] == "They said: a, b"
    step = ["model.called", "model.finished", "tool.called", "tool.finished"]
    types = session.types(turn["id"])
    assert types == [
        "turn.accepted",
        *step,
        *step,
        "model.called",
        "model.finished",
        "turn.finished",
    ]


def test_tools_run_at_the_same_time(session: Session) -> None:
    tools = [echo(text, 0.4) for text in "abc"]
    turn = session.turn(script("They said: {tool_results}", tools=tools, parallel=True))
    assert turn["text"] == "They said: a, b, c"
    events = session.events(turn_id=turn["id"])
    called = [event for event in events if event["type"] == "tool.called"]
    finished = [event for event in events if event["type"] == "tool.finished"]
    assert called[-1]["seq"] < finished[0]["seq"]
    assert finished[-1]["at"] - called[0]["at"] < 3 * 0.4
    assert {event["call_id"] for event in finished} == {event["call_id"] for event in called}


def test_a_tool_that_is_unknown_or_called_wrongly_is_the_models_to_mend(session: Session) -> None:
    tools = [{"name": "rocket", "arguments": {}}, {"name": "echo", "arguments": "not JSON"}]
    turn = session.turn(script("{tool_results}", tools=tools, parallel=True))
    assert turn["status"] == "completed"
    results = [e for e in session.events() if e["type"] == "tool.finished"]
    assert [result["status"] for result in results] == ["error", "error"]
    assert "rocket" in turn["text"]


# Many


def test_many_sessions_run_at_once_and_do_not_mix(
    system: System, http: httpx.Client, placement: str
) -> None:
    count = 4 if placement == "dedicated" else 24
    sessions = [Session.make(http, placement=placement) for _ in range(count)]

    def talk(session: Session) -> str:
        session.turn(f"My name is {session.id}.")
        with session.stream(SLOW) as stream:
            assert texts_of(list(stream)) == [STORY]
        return session.turn("What is my name?")["text"]

    with ThreadPoolExecutor(count) as threads:
        answers = list(threads.map(talk, sessions))
    assert answers == [f"Your name is {session.id}." for session in sessions]
    for session in sessions:
        system.assert_journal_sound(session.id)
