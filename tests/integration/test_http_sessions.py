"""agentray's own routes and clients against a running system: ``base_url`` is where it is."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from agentray.client.http import Client, Session
from agentray.client.http_async import AsyncClient
from agentray.errors import (
    CursorError,
    IdempotencyConflictError,
    InvalidRequestError,
    NotReadyError,
    SessionBusyError,
    SessionClosedError,
    SessionNotFoundError,
    TurnNotFoundError,
)
from agentray.events import ModelFinished, TurnAccepted, TurnFinished
from agentray.sessions.base import Cursor, Delta
from tests.integration.unreliable import unreliable

DEADLINE_S = 30.0
TEXT = " ".join(f"word{number}" for number in range(40))


def sim(**script: Any) -> str:
    return "!sim " + json.dumps(script)


SCRIPT = sim(text=TEXT, tokens=40)
SLOW = sim(text=TEXT, tokens=40, tps=40)


@pytest.fixture
def client(base_url: str) -> Iterator[Client]:
    with Client(base_url) as client:
        yield client


@pytest.fixture
def session(client: Client) -> Session:
    return client.session(f"test-{uuid.uuid4().hex}", agent="assistant", user="tester")


def test_a_session_is_made_by_its_first_message(session: Session) -> None:
    with pytest.raises(SessionNotFoundError):
        session.info()
    turn = session.send("hello")
    assert turn.status == "completed"
    assert turn.text is not None
    assert turn.text.startswith("You said: hello")
    assert turn.usage is not None
    info = session.info()
    assert (info.user, info.agent, info.turns) == ("tester", "assistant", 1)
    shown = session.turn(turn.id)
    assert (shown.text, shown.state, shown.last_seq) == (turn.text, "done", turn.last_seq)


def test_sessions_are_listed_by_pages_and_deleted(client: Client) -> None:
    user = f"user-{uuid.uuid4().hex}"
    made = [client.sessions.create(user=user).id for _ in range(5)]
    listed: list[str] = []
    after: str | None = None
    while True:
        page = client.sessions.list(user=user, after=after, limit=2)
        listed += [info.id for info in page.data]
        after = page.next
        if not page.has_more:
            break
    assert listed == made[::-1]
    client.sessions.delete(made[0])
    with pytest.raises(SessionNotFoundError):
        client.sessions.get(made[0])


def test_the_deltas_of_a_stream_are_its_text(session: Session) -> None:
    stream = session.stream(SCRIPT)
    items = list(stream)
    assert "".join(item.text for item in items if isinstance(item, Delta)) == TEXT
    assert (stream.text, stream.status) == (TEXT, "completed")
    assert isinstance(items[0], TurnAccepted)
    assert isinstance(items[-1], TurnFinished)
    events = [item for item in items if not isinstance(item, Delta)]
    assert list(session.events()) == events
    assert [event.seq for event in events] == list(range(1, len(events) + 1))


async def test_the_async_client_does_the_same(base_url: str) -> None:
    async with AsyncClient(base_url) as client:
        session = client.session()
        stream = session.stream(SCRIPT)
        assert "".join([text async for text in stream.texts()]) == TEXT
        turn = await session.send("hello")
        assert turn.status == "completed"
        finished = [e async for e in session.events() if isinstance(e, TurnFinished)]
        assert len(finished) == 2
        await session.delete()


@pytest.mark.parametrize("first_cut", [0, 1, 150, 400, 700])
def test_a_stream_whose_connection_breaks_again_and_again_misses_and_doubles_nothing(
    base_url: str, first_cut: int
) -> None:
    # Each connection lives a little longer than the one before.
    with (
        unreliable(base_url, lambda n: first_cut + 600 * n) as url,
        Client(url, retries=40) as client,
    ):
        session = client.session()
        stream = session.stream(SLOW)
        items = list(stream)
        assert "".join(item.text for item in items if isinstance(item, Delta)) == TEXT
        events = [item for item in items if not isinstance(item, Delta)]
        assert stream.status == "completed"
    with Client(base_url) as client:
        assert list(client.session(session.id).events()) == events


def test_an_answer_that_was_lost_is_asked_for_again_and_the_turn_runs_once(base_url: str) -> None:
    with unreliable(base_url, lambda n: 0 if n < 2 else None) as url, Client(url) as client:
        session = client.session()
        turn = session.send("hello")
        events = list(session.events())
    assert [e.turn_id for e in events if isinstance(e, TurnAccepted)] == [turn.id]


def test_who_hangs_up_ends_nothing(session: Session) -> None:
    stream = session.stream(SLOW)
    for item in stream:
        if isinstance(item, Delta):
            break
    stream.close()
    for item in session.follow(after=stream.cursor):
        if isinstance(item, TurnFinished):
            break
    (finished,) = [e for e in session.events() if isinstance(e, ModelFinished)]
    assert finished.text == TEXT


def test_a_tail_goes_on_behind_every_cursor(session: Session) -> None:
    stream = session.stream(SCRIPT)
    cursors = [Cursor(0)]
    texts = [""]
    for item in stream:
        texts.append(texts[-1] + (item.text if isinstance(item, Delta) else ""))
        cursors.append(stream.cursor)
    for cursor, text in zip(cursors[:-1], texts[:-1], strict=True):
        rest = ""
        for item in session.follow(after=cursor):
            rest += item.text if isinstance(item, Delta) else ""
            if isinstance(item, TurnFinished):
                break
        assert text + rest == TEXT


def test_a_busy_session_queues_rejects_or_is_interrupted(session: Session) -> None:
    running = session.submit(SLOW)
    waiting = session.submit("second")
    with pytest.raises(SessionBusyError):
        session.send("third", if_busy="reject")
    last = session.send("fourth", if_busy="interrupt")
    assert last.status == "completed"
    assert session.turn(running.id).status == "cancelled"
    assert session.turn(waiting.id).status == "cancelled"


def test_a_cancel_ends_what_runs_and_what_waits(session: Session) -> None:
    running, waiting = session.submit(SLOW), session.submit("second")
    assert sorted(session.cancel()) == sorted([running.id, waiting.id])
    for item in session.follow():
        if isinstance(item, TurnFinished) and item.turn_id == waiting.id:
            break
    assert session.turn(running.id).status == session.turn(waiting.id).status == "cancelled"
    with pytest.raises(InvalidRequestError):
        session.cancel()
    assert session.cancel(running.id) == [running.id]


def test_an_idempotency_key_runs_a_turn_once(session: Session) -> None:
    first = session.send("hello", idempotency_key="k")
    assert session.send("hello", idempotency_key="k").id == first.id
    with pytest.raises(IdempotencyConflictError):
        session.send("other", idempotency_key="k")
    assert session.info().turns == 1


def test_what_is_not_there_is_said_with_the_right_class(client: Client, session: Session) -> None:
    session.send("hello")
    with pytest.raises(TurnNotFoundError):
        session.turn("0" * 26)
    with pytest.raises(InvalidRequestError):
        client.sessions.get("odd id")
    with pytest.raises(InvalidRequestError):
        client.sessions.create(agent="nobody")
    with pytest.raises(CursorError):
        list(session.events(after=99))
    with pytest.raises(CursorError):
        next(session.follow(after=Cursor(99)))


def test_nobody_at_the_address_is_said_so() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with Client(url, retries=1) as client, pytest.raises(NotReadyError):
        client.session("s").send("hello")


def test_a_closed_time_to_live_refuses_turns_and_keeps_the_session(client: Client) -> None:
    session = client.session(ttl_s=0.2)
    session.send("hello")
    deadline = time.monotonic() + DEADLINE_S
    while session.info().status != "closed":
        assert time.monotonic() < deadline
    with pytest.raises(SessionClosedError):
        session.send("again")
    assert list(session.events())


def test_many_streams_at_once_each_get_their_own_text(client: Client) -> None:
    found: dict[int, str | None] = {}

    def talk(number: int) -> None:
        stream = client.session().stream(sim(text=f"{number} " * 20, tokens=20))
        found[number] = "".join(stream.texts())

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {number: f"{number} " * 20 for number in range(16)}


def test_health_and_metrics_are_answered(base_url: str) -> None:
    assert httpx.get(f"{base_url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{base_url}/readyz").json()["ready"] is True
    metrics = httpx.get(f"{base_url}/metrics")
    assert metrics.status_code == 200
    assert "# HELP agentray_" in metrics.text


def agentray(*arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "agentray", *arguments],
        input=given,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_commands_talk_list_show_cancel_and_delete(base_url: str) -> None:
    name = f"cli-{uuid.uuid4().hex}"
    where = ("--url", base_url)
    said = agentray("chat", "--session", name, *where, given=f"hello\n{SCRIPT}\n/exit\nno\n")
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("You said: hello")
    assert TEXT in said.stdout
    assert name in agentray("sessions", "ls", *where).stdout
    shown = json.loads(agentray("sessions", "show", name, "--json", *where).stdout)
    assert shown["session"]["turns"] == 2
    assert TEXT in agentray("sessions", "show", name, *where).stdout
    nothing = agentray("sessions", "cancel", name, *where)
    assert (nothing.returncode, "nothing to cancel" in nothing.stderr) == (1, True)
    assert agentray("sessions", "rm", name, *where).returncode == 0
    assert agentray("sessions", "show", name, *where).returncode == 1
    status = agentray("status", "--json", *where)
    assert (status.returncode, json.loads(status.stdout)["ready"]) == (0, True)


def test_a_failed_answer_is_an_exit_code(base_url: str) -> None:
    failed = agentray("chat", "--url", base_url, given=sim(status=400) + "\n")
    assert failed.returncode == 1
    assert "400" in failed.stderr
