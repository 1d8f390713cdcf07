"""Bad input to a whole system: each a clear error in OpenAI's shape, and nothing is lost by it."""

from __future__ import annotations

import json
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.followed_turn import script
from tests.integration.wire import Session, eventually
from tests.system import System

STORY = "Once upon a time an actor kept a journal of all that it did."
SLOW = script(STORY, tokens=12, tps=10)
NOBODY = f"resp_{'0' * 26}_nobody"
LONG = "x" * 10_000
MIB = 1024 * 1024


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    """Return the error of an answer, which must have OpenAI's shape."""
    assert answer.status_code == status, answer.text[:500]
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert isinstance(error["message"], str)
    assert 0 < len(error["message"]) < 1_000
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    return error


@pytest.fixture(scope="module")
def session(http: httpx.Client) -> Session:
    """A session with a history, which no bad input may change."""
    session = Session.make(http)
    session.turn("My name is Ada.")
    return session


# Method, path (with {s} for the session), body (bytes as they are), status, code, param.
TABLE: list[tuple[str, str, Any, int, str, str | None]] = [
    # Malformed
    ("POST", "/v1/responses", b'{"input": ', 400, "invalid_request", None),
    ("POST", "/v1/responses", b'{"input": "\xff\xfe"}', 400, "invalid_request", None),
    ("POST", "/v1/responses", b'{"input": "\\ud800"}', 400, "invalid_request", None),
    ("POST", "/v1/responses", b"[" * 100_000, 400, "invalid_request", None),
    ("POST", "/v1/responses", b"\x00\x01\x02", 400, "invalid_request", None),
    ("POST", "/v1/responses", b"", 400, "invalid_request", "input"),
    ("POST", "/v1/responses", [1, 2], 400, "invalid_request", None),
    ("POST", "/v1/sessions", b"{'id': 'x'}", 400, "invalid_request", None),
    ("POST", "/v1/sessions/{s}/turns", b"input=hello", 400, "invalid_request", None),
    ("POST", "/v1/chat/completions", b"null", 400, "invalid_request", None),
    # Wrong types and values
    ("POST", "/v1/responses", {"input": 5}, 400, "invalid_request", "input"),
    ("POST", "/v1/responses", {"input": ""}, 400, "invalid_request", "input"),
    ("POST", "/v1/responses", {"input": "x", "stream": "yes"}, 400, "invalid_request", "stream"),
    (
        "POST",
        "/v1/responses",
        {"input": "x", "temperature": 3},
        400,
        "invalid_request",
        "temperature",
    ),
    (
        "POST",
        "/v1/responses",
        {"input": "x", "max_output_tokens": 0},
        400,
        "invalid_request",
        "max_output_tokens",
    ),
    ("POST", "/v1/sessions", {"placement": "moon"}, 400, "invalid_request", "placement"),
    ("POST", "/v1/sessions", {"ttl_s": -1}, 400, "invalid_request", "ttl_s"),
    ("POST", "/v1/sessions", {"ttl_s": "1 day"}, 400, "invalid_request", "ttl_s"),
    ("POST", "/v1/sessions", {"metadata": {"a": 1}}, 400, "invalid_request", "metadata[...]"),
    ("POST", "/v1/sessions", {"user": "a\x00b"}, 400, "invalid_request", "user"),
    ("POST", "/v1/sessions", {"agnet": "assistant"}, 400, "invalid_request", "agnet"),
    (
        "POST",
        "/v1/sessions/{s}/turns",
        {"input": "x", "if_busy": "wait"},
        400,
        "invalid_request",
        "if_busy",
    ),
    (
        "POST",
        "/v1/sessions/{s}/turns",
        {"input": [{"role": "king", "content": "x"}]},
        400,
        "invalid_request",
        "input[0].role",
    ),
    (
        "POST",
        "/v1/sessions/{s}/turns",
        {"input": "x", "idempotency_key": "a b"},
        400,
        "invalid_request",
        "idempotency_key",
    ),
    ("POST", "/v1/chat/completions", {"model": "simulator"}, 400, "invalid_request", "messages"),
    ("GET", "/v1/sessions?limit=many", None, 400, "invalid_request", "limit"),
    ("GET", "/v1/sessions?limit=1000000", None, 400, "invalid_request", "limit"),
    ("GET", "/v1/sessions?after=nowhere", None, 400, "invalid_request", "after"),
    ("GET", "/v1/sessions?after=1e999~x", None, 400, "invalid_request", "after"),
    ("GET", "/v1/sessions?colour=red", None, 400, "invalid_request", "colour"),
    # Unknown
    ("GET", "/v1/sessions/nobody", None, 404, "session_not_found", None),
    ("DELETE", "/v1/sessions/nobody", None, 404, "session_not_found", None),
    ("GET", "/v1/sessions/nobody/events", None, 404, "session_not_found", None),
    ("POST", "/v1/sessions/nobody/turns", {"input": "x"}, 404, "session_not_found", None),
    ("POST", "/v1/sessions/nobody/cancel", {}, 404, "session_not_found", None),
    ("GET", f"/v1/sessions/{{s}}/turns/{'0' * 26}", None, 404, "turn_not_found", None),
    ("GET", f"/v1/sessions/{{s}}/events?turn_id={'0' * 26}", None, 404, "turn_not_found", None),
    ("GET", f"/v1/responses/{NOBODY}", None, 404, "session_not_found", None),
    (
        "POST",
        "/v1/responses",
        {"input": "x", "conversation": "nobody"},
        404,
        "session_not_found",
        None,
    ),
    (
        "POST",
        "/v1/responses",
        {"input": "x", "previous_response_id": NOBODY},
        404,
        "session_not_found",
        None,
    ),
    ("GET", "/v1/conversations/nobody", None, 404, "session_not_found", None),
    ("GET", "/v1/conversations/{s}/items/msg_1", None, 404, "item_not_found", "item_id"),
    ("POST", "/v1/sessions", {"agent": "nobody"}, 400, "invalid_request", "agent"),
    ("POST", "/v1/responses", {"input": "x", "model": "gpt-99"}, 404, "model_not_found", "model"),
    (
        "POST",
        "/v1/sessions/{s}/turns",
        {"input": "x", "model": "gpt-99"},
        404,
        "model_not_found",
        "model",
    ),
    ("GET", "/v1/models/gpt-99", None, 404, "model_not_found", "model"),
    ("GET", "/v1/nothing", None, 404, "not_found", None),
    ("PUT", "/v1/sessions/{s}", {}, 405, "method_not_allowed", None),
    ("DELETE", f"/v1/responses/{NOBODY}", None, 405, "method_not_allowed", None),
    # Ids with odd characters, or very long
    ("GET", "/v1/sessions/%00", None, 400, "invalid_request", "session_id"),
    ("GET", "/v1/sessions/%F0%9F%98%80", None, 400, "invalid_request", "session_id"),
    ("GET", "/v1/sessions/a%2Fb", None, 400, "invalid_request", "session_id"),
    ("GET", "/v1/sessions/a%20b", None, 400, "invalid_request", "session_id"),
    ("GET", "/v1/sessions/..%2F..%2Fetc", None, 400, "invalid_request", "session_id"),
    ("GET", "/v1/sessions/%FF%FE", None, 400, "invalid_request", "session_id"),
    ("GET", f"/v1/sessions/{LONG}", None, 400, "invalid_request", "session_id"),
    ("POST", f"/v1/sessions/{LONG}/turns", {"input": "x"}, 400, "invalid_request", "session_id"),
    ("GET", f"/v1/responses/{LONG}", None, 400, "invalid_request", "response_id"),
    ("GET", f"/v1/models/{LONG}", None, 404, "model_not_found", "model"),
    ("POST", "/v1/sessions", {"id": LONG}, 400, "invalid_request", "id"),
    ("POST", "/v1/sessions", {"id": "a\nb"}, 400, "invalid_request", "id"),
    (
        "POST",
        "/v1/responses",
        {"input": "x", "conversation": LONG},
        400,
        "invalid_request",
        "conversation",
    ),
    (
        "POST",
        "/v1/responses",
        {"input": "x", "previous_response_id": LONG},
        400,
        "invalid_request",
        "previous_response_id",
    ),
    # Unsupported, or contradicting each other
    (
        "POST",
        "/v1/responses",
        {"input": "x", "store": False},
        400,
        "unsupported_parameter",
        "store",
    ),
    (
        "POST",
        "/v1/responses",
        {"input": "x", "tools": [{"type": "web_search"}]},
        400,
        "unsupported_parameter",
        "tools",
    ),
    (
        "POST",
        "/v1/responses",
        {"input": "x", "text": {"format": {"type": "grammar"}}},
        400,
        "unsupported_parameter",
        "text.format.type",
    ),
    (
        "POST",
        "/v1/responses",
        {
            "input": "x",
            "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "x"}}},
        },
        400,
        "invalid_request",
        "text.format.schema",
    ),
    (
        "POST",
        "/v1/chat/completions",
        {"model": "simulator", "messages": [{"role": "user", "content": "x"}], "store": True},
        400,
        "unsupported_parameter",
        "store",
    ),
    (
        "POST",
        "/v1/responses",
        {"input": "x", "conversation": "a", "previous_response_id": NOBODY},
        400,
        "invalid_request",
        "previous_response_id",
    ),
    # Cursors
    ("GET", "/v1/sessions/{s}/events?after=999", None, 400, "invalid_cursor", "after"),
    ("GET", "/v1/sessions/{s}/events?after=-1", None, 400, "invalid_request", "after"),
    ("GET", "/v1/sessions/{s}/events?after=later", None, 400, "invalid_request", "after"),
    ("GET", f"/v1/sessions/{{s}}/events?after={'9' * 15}", None, 400, "invalid_cursor", "after"),
    ("GET", f"/v1/sessions/{{s}}/events?after={'9' * 40}", None, 400, "invalid_request", "after"),
    # Nothing to cancel
    ("POST", "/v1/sessions/{s}/cancel", {}, 400, "invalid_request", "turn_id"),
    (
        "POST",
        "/v1/sessions/{s}/cancel",
        {"turn_id": "0" * 26},
        404,
        "turn_not_found",
        None,
    ),
    ("POST", f"/v1/responses/{NOBODY}/cancel", None, 404, "session_not_found", None),
]


def _name(row: Any) -> str:
    method, path, body, *_ = row
    return f"{method} {path} {body!r}"[:70].replace(LONG[:70], "xxx")


@pytest.mark.parametrize("row", TABLE, ids=_name)
def test_bad_input_is_a_clear_error(http: httpx.Client, session: Session, row: Any) -> None:
    method, path, body, status, code, param = row
    plain = isinstance(body, bytes) or body is None
    sent: dict[str, Any] = {"content": body} if plain else {"json": body}
    before = session.events()
    answer = http.request(method, path.replace("{s}", session.id), **sent)
    error = error_of(answer, status)
    assert (error["code"], error["param"]) == (code, param)
    assert session.events() == before


def test_a_cursor_in_the_future_is_refused_by_a_stream_too(
    http: httpx.Client, session: Session
) -> None:
    headers = {"Accept": "text/event-stream"}
    answer = http.get(f"{session.path}/events", params={"after": "999"}, headers=headers)
    assert error_of(answer, 400)["code"] == "invalid_cursor"
    response = http.post("/v1/responses", json={"input": "hi"}).json()
    query = {"stream": "true", "starting_after": 2**40}
    answer = http.get(f"/v1/responses/{response['id']}", params=query)
    error = error_of(answer, 400)
    assert (error["code"], error["param"]) == ("invalid_cursor", "starting_after")


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/sessions/{s}/turns", "/v1/sessions"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_refused(
    http: httpx.Client, session: Session, path: str, chunked: bool
) -> None:
    body = json.dumps({"input": "x" * 5 * MIB}).encode()
    sent: Any = (body[at : at + MIB] for at in range(0, len(body), MIB)) if chunked else body
    answer = http.post(path.replace("{s}", session.id), content=sent)
    assert error_of(answer, 413)["code"] == "body_too_large"
    assert session.info()["last_seq"] == 4


def test_text_of_any_characters_comes_back_as_it_was(http: httpx.Client) -> None:
    odd = "\x00 \u2028 \U0001f600 e\u0301 \\u0000 \ufffe </script> ' \" %s \r\n"
    session = Session.make(http, metadata={"odd\x00key": odd})
    assert session.info()["metadata"] == {"odd\x00key": odd}
    turn = session.turn(odd)
    assert turn["status"] == "completed"
    assert session.events()[0]["input"] == [{"role": "user", "content": odd}]
    assert odd in session.turn(script(odd))["text"]


@contextmanager
def raw(system: System, head: str, body: bytes = b"", *, room: int = 0) -> Iterator[socket.socket]:
    """Send a request over a connection of its own, whose receive buffer may be small."""
    with socket.socket() as connection:
        if room:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
        connection.settimeout(30)
        connection.connect(("127.0.0.1", system.port))
        lines = [head, "Host: test", f"Content-Length: {len(body)}", "", ""]
        connection.sendall("\r\n".join(lines).encode() + body)
        yield connection


def test_what_is_no_http_is_refused_and_harms_nobody(system: System, http: httpx.Client) -> None:
    for garbage in (b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\n" * 99):
        with socket.create_connection(("127.0.0.1", system.port), timeout=10) as connection:
            connection.sendall(garbage)
            connection.shutdown(socket.SHUT_WR)
            answer = _rest(connection)
            assert b" 200 " not in answer[:20]
    assert http.get("/healthz").status_code == 200


# Clients that leave, or do not read


@pytest.mark.parametrize("placement", ["shared", "dedicated"])
@pytest.mark.parametrize("stream", [True, False])
def test_the_turn_goes_on_when_its_client_hangs_up(
    system: System, http: httpx.Client, placement: str, stream: bool
) -> None:
    session = Session.make(http, placement=placement)
    body = json.dumps({"input": SLOW, "stream": stream}).encode()
    head = f"POST {session.path}/turns HTTP/1.1\r\nContent-Type: application/json"
    with raw(system, head, body) as connection:
        if stream:
            assert b"200 OK" in connection.recv(4096)
        eventually(lambda: session.info()["status"] == "running", what="the turn runs")
    eventually(lambda: session.info()["status"] == "idle", what="the turn has ended")
    journal = system.assert_journal_sound(session.id)
    assert [(turn.status, turn.text) for turn in journal.turns()] == [("completed", STORY)]


def test_half_a_request_makes_no_turn(system: System, http: httpx.Client) -> None:
    session = Session.make(http)
    head = f"POST {session.path}/turns HTTP/1.1\r\nHost: test\r\nContent-Length: 100\r\n\r\n"
    with socket.create_connection(("127.0.0.1", system.port)) as connection:
        connection.sendall(head.encode() + b'{"input": "hello"}')
    assert session.turn("whole")["first_seq"] == 1
    assert len(system.assert_journal_sound(session.id).turns()) == 1


def test_a_slow_reader_is_dropped_and_can_resume(system: System, http: httpx.Client) -> None:
    # More than all buffers on the way can hold; a model refuses so much, the journal does not.
    session = Session.make(http)
    for _ in range(8):
        assert session.turn("x" * (4 * MIB - 200))["status"] == "failed"
    whole = session.events()
    dropped = len(system.log("stream_dropped"))
    head = f"GET {session.path}/events HTTP/1.1\r\nAccept: text/event-stream"
    with raw(system, head, room=4096) as connection:
        eventually(lambda: len(system.log("stream_dropped")) > dropped, what="it is dropped")
        got = _rest(connection)
    assert not got.endswith(b"0\r\n\r\n"), "the stream must not look complete"
    ids = [line[4:] for line in got.splitlines() if line.startswith(b"id: ")]
    events = got.count(b"\ndata: ")
    assert events < len(whole)
    cursor = ids[events - 2].decode() if events > 1 else "0"
    rest: list[int] = []
    for event in session.follow(after=cursor):
        rest.append(event.data["seq"])
        if event.data["seq"] == whole[-1]["seq"]:
            break
    seen = int(cursor.partition(".")[0])
    assert rest == [event["seq"] for event in whole if event["seq"] > seen]
    assert session.turn(f"And now? {uuid.uuid4().hex}")["first_seq"] == whole[-1]["seq"] + 1


def _rest(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(1 << 20), b""))
