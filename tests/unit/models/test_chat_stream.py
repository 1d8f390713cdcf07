"""Assembly of a streamed answer."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentray.errors import (
    ModelContextLengthError,
    ModelError,
    ModelRateLimitedError,
    ModelUnavailableError,
)
from agentray.events import ToolCall, Usage
from agentray.models.chat_stream import ChatStream


def chunk(delta: dict[str, Any] | None = None, finish: str | None = None, **more: Any) -> bytes:
    body = {"choices": [{"index": 0, "delta": delta or {}, "finish_reason": finish}], **more}
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


def call(index: int | None, **part: Any) -> dict[str, Any]:
    function = {key: part.pop(key) for key in ("name", "arguments") if key in part}
    return {"index": index, "function": function, **part}


DONE = b"data: [DONE]\n\n"
WHOLE = (
    b": hello\r\n\r\n"
    + chunk({"role": "assistant", "content": ""})
    + chunk({"content": "Zwölf "})
    + b"event: message\nid: 7\n"
    + chunk({"content": "Boxkämpfer 🥊\n"}).replace(b"\n\n", b"\r\n\r\n")
    + chunk({}, "stop")
    + b'data:{"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":3,'
    b'"prompt_tokens_details":{"cached_tokens":4}},"error":null}\n\n' + DONE
)


@given(st.lists(st.integers(0, len(WHOLE)), max_size=12))
def test_however_the_bytes_are_cut_the_answer_is_the_same(cuts: list[int]) -> None:
    stream = ChatStream("m")
    edges = [0, *sorted(cuts), len(WHOLE)]
    text = "".join(stream.feed(WHOLE[a:b]) for a, b in pairwise(edges))
    assert text == "Zwölf Boxkämpfer 🥊\n"
    assert stream.done
    assert stream.finish() == ()
    assert stream.finish_reason == "stop"
    assert stream.usage == Usage(9, 3, 4)


def test_all_chunks_of_one_read_come_as_one_text() -> None:
    assert ChatStream("m").feed(chunk({"content": "a"}) + chunk({"content": "b"})) == "ab"


def test_parallel_tool_calls_are_put_together_by_their_index() -> None:
    stream = ChatStream("m")
    for part in (
        [call(1, id="c1", name="add", arguments="")],
        [call(0, id="c0", name="echo", arguments='{"te')],
        [call(0, arguments='xt":"x"}'), call(1, arguments="{}")],
    ):
        stream.feed(chunk({"tool_calls": part}))
    stream.feed(chunk({}, "tool_calls") + DONE)
    assert stream.finish() == (
        ToolCall("c0", "echo", '{"text":"x"}'),
        ToolCall("c1", "add", "{}"),
    )


def test_tool_calls_without_index_or_id_are_told_apart() -> None:
    stream = ChatStream("m")
    stream.feed(
        chunk({"tool_calls": [call(None, id="a", name="f", arguments="{")]})
        + chunk({"tool_calls": [call(None, arguments="}")]})
        + chunk({"tool_calls": [call(None, id="b", name="g", arguments="{}")]})
        + chunk({}, "tool_calls")
    )
    assert [(c.call_id, c.arguments) for c in stream.finish()] == [("a", "{}"), ("b", "{}")]

    nameless = ChatStream("m")
    nameless.feed(chunk({"tool_calls": [call(0, name="f"), call(1, name="g")]}, "tool_calls"))
    first, second = nameless.finish()
    assert first.call_id != second.call_id


def test_thoughts_are_progress_but_not_text() -> None:
    stream = ChatStream("m")
    stream.feed(chunk({"role": "assistant", "content": "", "reasoning_content": None}))
    assert not stream.started
    assert stream.feed(chunk({"reasoning_content": "hm"})) == ""
    assert stream.started


def test_the_text_of_a_refusing_model_is_its_answer() -> None:
    assert ChatStream("m").feed(chunk({"refusal": "I will not"})) == "I will not"


def test_an_answer_is_whole_with_its_finish_reason_even_without_the_end_mark() -> None:
    stream = ChatStream("m")
    stream.feed(chunk({"content": "a"}, "length"))
    assert stream.finish() == ()
    assert stream.finish_reason == "length"


@pytest.mark.parametrize("end", [b"", DONE], ids=["closed", "marked"])
def test_an_answer_without_finish_reason_is_none(end: bytes) -> None:
    stream = ChatStream("m")
    stream.feed(chunk({"content": "half an"}) + end)
    with pytest.raises(ModelUnavailableError, match="before the answer was whole"):
        stream.finish()


def test_an_empty_answer_is_an_error_unless_a_text_is_continued() -> None:
    for may_be_empty in (False, True):
        stream = ChatStream("m", may_be_empty=may_be_empty)
        stream.feed(chunk({"content": ""}) + chunk({}, "stop") + DONE)
        if may_be_empty:
            assert stream.finish() == ()
        else:
            with pytest.raises(ModelUnavailableError, match="empty answer"):
                stream.finish()


def test_an_answer_whose_limit_left_no_room_for_text_is_whole() -> None:
    stream = ChatStream("m")
    stream.feed(chunk({"reasoning_content": "hm"}) + chunk({}, "length") + DONE)
    assert stream.finish() == ()
    assert stream.finish_reason == "length"


@pytest.mark.parametrize("reason", ["error", "abort", "aborted"])
def test_an_answer_that_its_endpoint_broke_off_has_no_end(reason: str) -> None:
    stream = ChatStream("m")
    stream.feed(chunk({"content": "half an"}))
    with pytest.raises(ModelUnavailableError, match="broke its answer off"):
        stream.feed(chunk({}, reason) + DONE)
    # So it can be gone on with.
    assert stream.finish_reason is None


@pytest.mark.parametrize(
    "delta",
    [
        {"reasoning": "hm"},
        {"reasoning_content": "hm"},
        {"function_call": {"name": "f"}},
        {"audio": {"data": "AAAA"}},
    ],
)
def test_what_only_the_client_can_use_is_an_answer_where_it_gets_the_stream(
    delta: dict[str, Any],
) -> None:
    passed, own = ChatStream("m", passed_on=True), ChatStream("m")
    for stream in (passed, own):
        stream.feed(chunk(delta))
        assert stream.started
        stream.feed(chunk({}, "stop") + DONE)
    assert passed.finish() == ()
    with pytest.raises(ModelUnavailableError, match="empty answer"):
        own.finish()


def test_one_of_several_choices_is_an_answer_where_the_client_gets_the_stream() -> None:
    stream = ChatStream("m", passed_on=True)
    other = {"index": 1, "delta": {"content": "yes"}, "finish_reason": None}
    stream.feed(b"data: " + json.dumps({"choices": [other]}).encode() + b"\n\n")
    stream.feed(chunk({}, "stop") + DONE)
    assert stream.finish() == ()


@pytest.mark.parametrize(
    ("said", "usage"),
    [
        (
            {
                "prompt_tokens": 5,
                "completion_tokens": 3,
                "prompt_tokens_details": {"cached_tokens": 2_000},
            },
            Usage(5, 3, 5),
        ),
        ({"prompt_tokens": -1, "completion_tokens": 3}, Usage(0, 3)),
        ({"prompt_tokens": 12.5}, Usage()),
        ("1", Usage()),
        ([], Usage()),
    ],
)
def test_tokens_that_cannot_be_are_none_and_do_not_spoil_an_answer(said: Any, usage: Usage) -> None:
    stream = ChatStream("m")
    stream.feed(chunk({"content": "a"}, "stop") + chunk({}, usage=said) + DONE)
    assert stream.finish() == ()
    assert stream.usage == usage


def test_a_withheld_answer_is_not_worth_another_call() -> None:
    stream = ChatStream("m")
    stream.feed(chunk({}, "content_filter") + DONE)
    with pytest.raises(ModelError) as caught:
        stream.finish()
    assert not caught.value.retryable


@pytest.mark.parametrize(
    "garbage",
    [
        b"<html>\n",
        b"data: {broken\n",
        b"data: [1]\n",
        b'data: {"choices": [{"delta": {"content": 7}}]}\n',
        b'data: {"choices": "none"}\n',
        b"data: \xff\xfe\n",
        b'data: {"error": ' + b"[" * 100_000 + b"\n",
        b'data: {"choices": [{"delta": {"content": "\xff"}}]}\n',
    ],
)
def test_what_is_no_event_stream_of_a_chat_answer_is_refused(garbage: bytes) -> None:
    stream = ChatStream("m")
    stream.feed(chunk({"content": "a"}))
    with pytest.raises(ModelUnavailableError, match="malformed"):
        stream.feed(garbage)


def test_an_endless_line_is_refused() -> None:
    stream = ChatStream("m")
    megabyte = b"x" * 1024 * 1024
    for _ in range(16):
        stream.feed(megabyte)
    with pytest.raises(ModelUnavailableError, match="too long"):
        stream.feed(megabyte)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"message": "slow down", "code": 429}, ModelRateLimitedError),
        ({"message": "slow down", "type": "rate_limit_error"}, ModelRateLimitedError),
        ({"message": "too long", "code": "context_length_exceeded"}, ModelContextLengthError),
        ({"message": "broke", "code": 500}, ModelUnavailableError),
        ({"message": "broke"}, ModelUnavailableError),
        ("broke", ModelUnavailableError),
    ],
)
def test_an_error_in_the_stream_is_raised_as_what_it_says(
    error: object, kind: type[ModelError]
) -> None:
    stream = ChatStream("m")
    stream.feed(chunk({"content": "a"}))
    with pytest.raises(ModelError) as caught:
        stream.feed(b"data: " + json.dumps({"error": error}).encode() + b"\n\n")
    assert type(caught.value) is kind
    assert caught.value.fields["model"] == "m"


# Longer than was asked for: 32 characters a token, and a thousand besides, are still believed.


def test_an_answer_that_never_ends_is_cut_and_has_reached_its_limit() -> None:
    stream = ChatStream("m", max_tokens=10)
    text = "".join(stream.feed(chunk({"content": "x" * 500})) for _ in range(10))
    assert text == "x" * (10 * 32 + 1_000)
    assert (stream.done, stream.finish_reason) == (True, "length")
    assert stream.finish() == ()


@pytest.mark.parametrize("max_tokens", [10, None])
def test_an_answer_within_its_limit_is_whole(max_tokens: int | None) -> None:
    stream = ChatStream("m", max_tokens=max_tokens)
    assert stream.feed(chunk({"content": "x" * 1_320}, "stop") + DONE) == "x" * 1_320
    assert stream.finish_reason == "stop"


def test_a_tool_call_that_never_ends_is_no_answer() -> None:
    stream = ChatStream("m", max_tokens=10)
    stream.feed(chunk({"tool_calls": [call(0, id="a", name="f", arguments="{" * 1_000)]}))
    with pytest.raises(ModelUnavailableError, match="tool call is longer than was asked for"):
        stream.feed(chunk({"tool_calls": [call(0, arguments="{" * 1_000)]}))


def test_a_limit_beyond_all_bounds_does_not_lift_the_bound() -> None:
    stream = ChatStream("m", max_tokens=10**9)
    megabyte = chunk({"content": "x" * 1024 * 1024})
    size = sum(len(stream.feed(megabyte)) for _ in range(20))
    assert size == 16 * 1024 * 1024
    assert stream.finish_reason == "length"
