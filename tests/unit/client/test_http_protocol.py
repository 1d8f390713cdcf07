from __future__ import annotations

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentray.client.http_protocol import Attempts, Following, decode, error_of, turn_request
from agentray.errors import (
    AgentRayError,
    BackpressureError,
    InvalidRequestError,
    NotReadyError,
    SessionBusyError,
    SessionNotFoundError,
    StorageUnavailableError,
)
from agentray.events import TurnOptions
from agentray.http.errors import UnsupportedParameterError, describe, headers, status
from agentray.http.sse import comment, error_frame, native_frames
from agentray.sessions.base import Cursor
from tests.unit.http.turns import Script, scripts


def cut(body: bytes, data: st.DataObject) -> list[bytes]:
    """Return the bytes in pieces, as a connection may deliver them."""
    places = sorted(data.draw(st.sets(st.integers(0, len(body)), max_size=8)))
    return [body[a:b] for a, b in zip([0, *places], [*places, len(body)], strict=True)]


@given(scripts(), st.data())
def test_a_stream_is_read_whole_however_its_bytes_are_cut(
    script: Script, data: st.DataObject
) -> None:
    body, _ = native_frames(script.items, Cursor(0))
    following = Following("s")
    read = [i for piece in cut(comment("hello") + body, data) for i in following.feed(piece)]
    assert read == script.items


def test_a_stream_of_a_turn_is_asked_for_again_from_its_cursor() -> None:
    first = turn_request("s", "hi", key="k", if_busy="enqueue", options=TurnOptions(), stream=True)
    following = Following("s", first=first)
    assert following.request() is first
    following.opened({"x-agentray-turn-id": "t"})
    following.feed(b"half an ev")
    following.cursor = Cursor(3, 7)
    again = following.request()
    assert (again.method, again.path) == ("GET", "/v1/sessions/s/events")
    assert again.query == {"after": "3.7", "turn_id": "t"}
    # What was cut off comes again, whole.
    assert following.feed(comment("following")) == []


def test_an_event_of_tomorrow_is_passed_over() -> None:
    following = Following("s")
    data = b'{"type":"context.compacted","seq":3,"turn_id":"t","at":1.0}'
    assert following.feed(b"id: 3.0\nevent: context.compacted\ndata: " + data + b"\n\n") == []


def test_an_error_in_a_stream_is_raised() -> None:
    frame = error_frame(describe(StorageUnavailableError("away")))
    with pytest.raises(StorageUnavailableError, match="away"):
        Following("s").feed(frame)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (SessionNotFoundError("no", session_id="s"), SessionNotFoundError),
        (SessionBusyError("busy"), SessionBusyError),
        (BackpressureError("full", retry_after_s=7), BackpressureError),
        (InvalidRequestError("bad", param="input"), InvalidRequestError),
        (UnsupportedParameterError("no", param="tools"), InvalidRequestError),
    ],
)
def test_an_error_arrives_as_what_it_was(
    raised: AgentRayError, expected: type[AgentRayError]
) -> None:
    body = msgspec.json.encode(describe(raised))
    head = {key.decode(): value.decode() for key, value in headers(raised)}
    error = error_of(status(raised), body, head)
    assert type(error) is expected
    assert error.message == raised.message
    assert raised.fields.items() <= error.fields.items()


def test_an_answer_of_somebody_else_is_said_to_be_one() -> None:
    with pytest.raises(NotReadyError, match="502"):
        decode(httpx.Response(502, content=b"<html>Bad Gateway</html>"), dict)
    with pytest.raises(AgentRayError, match="not agentray's"):
        decode(httpx.Response(200, content=b"<html>hello</html>"), dict)


BROKEN = httpx.ReadError("cut")
REFUSED = httpx.ConnectError("refused")


def test_what_may_be_repeated_is_tried_a_bounded_number_of_times() -> None:
    attempts = Attempts(2, repeatable=True)
    assert all(attempts.pause_s(BROKEN) > 0 for _ in range(2))
    with pytest.raises(NotReadyError):
        attempts.pause_s(BROKEN)
    attempts.progressed()
    attempts.pause_s(BROKEN)


def test_what_may_not_be_repeated_is_tried_again_only_if_it_was_never_sent() -> None:
    with pytest.raises(NotReadyError):
        Attempts(5, repeatable=False).pause_s(BROKEN)
    Attempts(5, repeatable=False).pause_s(REFUSED)


@pytest.mark.parametrize("error", [BackpressureError("full"), SessionBusyError("busy")])
def test_a_refusal_is_not_tried_again(error: AgentRayError) -> None:
    with pytest.raises(type(error)):
        Attempts(5, repeatable=True).pause_s(error)
