from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from agentray.config.settings import HttpSettings
from agentray.errors import StorageUnavailableError
from agentray.http.exchange import ClientGoneError, Exchange
from agentray.http.sse import EventStream, Watchdog
from tests.unit.http.conftest import DEADLINE_S, Client
from tests.unit.http.memory import MemorySessions

TURNS = "/v1/sessions/s/turns"
EVENTS = "/v1/sessions/s/events"
SSE = {"accept": "text/event-stream"}
STREAMED = b'{"input": "hi", "stream": true}'


@pytest.fixture
def http_settings() -> HttpSettings:
    return HttpSettings(keepalive_s=0.02, stream_write_timeout_s=0.02)


@pytest.fixture
async def session(sessions: MemorySessions) -> str:
    await sessions.create("default", session_id="s")
    return "s"


def frames(text: str) -> list[tuple[dict[str, str], Any]]:
    """Return the fields and the data of each event; comments are left out."""
    found = []
    for frame in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in frame.splitlines() if line[:1] != ":")
        if fields:
            found.append((fields, json.loads(fields["data"])))
    return found


async def finished(task: asyncio.Task[None]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        await task


@pytest.mark.usefixtures("session")
async def test_a_turn_is_streamed_with_cursors_as_ids(client: Client) -> None:
    await finished(client.open("POST", TURNS, STREAMED))
    shown = frames(client.text)
    assert [fields["event"] for fields, _ in shown] == [
        "turn.accepted",
        "model.called",
        "model.delta",
        "model.delta",
        "model.finished",
        "turn.finished",
    ]
    assert [fields["id"] for fields, _ in shown] == ["1.0", "2.0", "2.3", "2.5", "3.0", "4.0"]
    assert all(data["type"] == fields["event"] for fields, data in shown)
    assert client.whole
    headers = dict(client.sent[0]["headers"])
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert headers[b"cache-control"] == b"no-store"
    assert headers[b"x-accel-buffering"] == b"no"


@pytest.mark.usefixtures("session")
async def test_a_whole_batch_is_one_send(client: Client) -> None:
    await finished(client.open("POST", TURNS, STREAMED))
    assert len(client.sent) == 2  # the head, and all that there was


@pytest.mark.usefixtures("session")
async def test_a_tail_goes_on_behind_a_cursor_in_the_middle_of_a_delta(client: Client) -> None:
    await finished(client.open("POST", TURNS, STREAMED))
    tail = Client(client.app)
    task = tail.open("GET", f"{EVENTS}?after=2.4", headers=SSE)
    await tail.until("turn.finished")
    deltas = [data["text"] for _, data in frames(tail.text) if data["type"] == "model.delta"]
    assert deltas == ["o"]
    tail.left.set()
    await finished(task)


@pytest.mark.usefixtures("session")
async def test_last_event_id_is_a_cursor_too(client: Client) -> None:
    await finished(client.open("POST", TURNS, STREAMED))
    tail = Client(client.app)
    task = tail.open("GET", EVENTS, headers={**SSE, "last-event-id": "3.0"})
    await tail.until("turn.finished")
    assert [fields["id"] for fields, _ in frames(tail.text)] == ["4.0"]
    tail.left.set()
    await finished(task)


@pytest.mark.usefixtures("session")
async def test_a_cursor_in_the_future_is_refused(client: Client) -> None:
    await finished(client.open("GET", f"{EVENTS}?after=9", headers=SSE))
    assert client.status == 400
    assert json.loads(client.text)["error"]["code"] == "invalid_cursor"


async def test_a_client_that_hangs_up_ends_the_following_and_not_the_turn(
    client: Client, sessions: MemorySessions, session: str
) -> None:
    sessions.hold = True
    task = client.open("POST", TURNS, STREAMED)
    await client.until("turn.accepted")
    client.left.set()
    await finished(task)
    assert sessions.followers == 0
    assert not sessions.cancelled
    assert [turn.state for turn in sessions.turns.values()] == ["running"]


async def test_a_reader_that_takes_nothing_is_dropped(
    client: Client, sessions: MemorySessions, session: str
) -> None:
    sessions.hold = True
    task = client.open("POST", TURNS, STREAMED)
    await client.until("turn.accepted")
    client.reads.clear()
    (turn_id,) = sessions.turns
    sessions.finish(turn_id)
    await finished(task)
    assert not client.whole
    assert sessions.followers == 0


class Connection:
    """Takes ``room`` messages and then no more, as uvicorn's with a client that does not read."""

    def __init__(self, room: int) -> None:
        self.sent: list[Any] = []
        self.room = room
        self.transport = self
        self.aborted = False

    async def send(self, message: Any) -> None:
        if len(self.sent) == self.room:
            await asyncio.Event().wait()
        self.sent.append(message)

    def abort(self) -> None:
        self.aborted = True


async def receive_nothing() -> Any:
    raise AssertionError


@pytest.mark.parametrize("room", [1, 2, 3])
async def test_a_reader_that_does_not_take_a_large_reply_is_cut_off(room: int) -> None:
    connection = Connection(room)
    scope = {"type": "http", "headers": []}
    exchange = Exchange(scope, receive_nothing, connection.send, stall_s=0.02)
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(ClientGoneError):
            await exchange.reply({"text": "x" * 150_000})
    assert connection.aborted
    assert len(connection.sent) == room


@pytest.mark.parametrize("size", [0, 65_536, 65_537, 131_072, 200_000])
async def test_a_large_reply_comes_whole_and_in_pieces_that_say_so(size: int) -> None:
    connection = Connection(9)
    scope = {"type": "http", "headers": []}
    exchange = Exchange(scope, receive_nothing, connection.send, stall_s=DEADLINE_S)
    body = bytes(range(250)) * (size // 250) + b"y" * (size % 250)
    await exchange.reply_bytes(body, (b"content-type", b"text/plain"))
    head, *pieces = connection.sent
    assert (b"content-length", b"%d" % size) in head["headers"]
    assert b"".join(piece["body"] for piece in pieces) == body
    assert max(len(piece["body"]) for piece in pieces) <= 65_536
    more = [piece.get("more_body", False) for piece in pieces]
    assert more == [True] * (len(pieces) - 1) + [False]
    assert not connection.aborted


@pytest.mark.usefixtures("session")
async def test_a_silent_stream_is_kept_open_by_comments(
    client: Client, sessions: MemorySessions
) -> None:
    sessions.hold = True
    task = client.open("POST", TURNS, STREAMED)
    await client.until(": keep-alive\n\n: keep-alive\n\n")
    (turn_id,) = sessions.turns
    sessions.finish(turn_id)
    await finished(task)
    assert len(frames(client.text)) == 6


@pytest.mark.usefixtures("session")
async def test_a_tail_ends_with_its_cursor_when_the_host_drains(
    client: Client, sessions: MemorySessions, draining: asyncio.Event
) -> None:
    await finished(client.open("POST", TURNS, STREAMED))
    tail = Client(client.app)
    task = tail.open("GET", EVENTS, headers=SSE)
    await tail.until("turn.finished")
    draining.set()
    await finished(task)
    assert tail.text.endswith(": this host stops: resume after 4.0\n\n")
    assert tail.whole


@pytest.mark.usefixtures("session")
async def test_the_stream_of_a_turn_goes_on_while_the_host_drains(
    client: Client, sessions: MemorySessions, draining: asyncio.Event
) -> None:
    sessions.hold = True
    draining.set()
    task = client.open("POST", TURNS, STREAMED)
    await client.until(": keep-alive")
    (turn_id,) = sessions.turns
    sessions.finish(turn_id)
    await finished(task)
    assert "turn.finished" in client.text


async def test_a_response_that_waits_says_so_before_it_begins(
    client: Client, sessions: MemorySessions
) -> None:
    sessions.queue = True
    task = client.open("POST", "/v1/responses", STREAMED)
    await client.until("response.queued")
    types = [data["type"] for _, data in frames(client.text)]
    assert types == ["response.created", "response.queued"]
    (turn_id,) = sessions.turns
    sessions.finish(turn_id)
    await finished(task)
    types = [data["type"] for _, data in frames(client.text)]
    assert types.count("response.created") == 1
    assert types[-1] == "response.completed"


@pytest.mark.parametrize(("path", "number"), [(TURNS, None), ("/v1/responses", 2)])
async def test_a_store_that_goes_away_in_mid_stream_is_said_in_the_stream(
    client: Client, sessions: MemorySessions, session: str, path: str, number: int | None
) -> None:
    sessions.hold = True
    task = client.open("POST", path, STREAMED)
    await client.until("turn.accepted" if path == TURNS else "response.in_progress")
    sessions.failure = StorageUnavailableError("away")
    sessions._notify()
    await finished(task)
    fields, data = frames(client.text)[-1]
    assert fields["event"] == "error"
    assert client.whole
    if number is None:
        assert data["error"]["code"] == "storage_unavailable"
    else:
        assert (data["code"], data["sequence_number"]) == ("storage_unavailable", number)


async def test_a_cancel_from_outside_goes_on_through_a_stream() -> None:
    watchdog = Watchdog(HttpSettings(), asyncio.Event())
    entered = asyncio.Event()

    async def receive() -> Any:
        raise AssertionError

    async def send(message: Any) -> None: ...

    async def serve() -> None:
        exchange = Exchange({"type": "http", "headers": []}, receive, send)
        async with EventStream(exchange, watchdog):
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(serve())
    await entered.wait()
    assert len(watchdog) == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(watchdog) == 0
