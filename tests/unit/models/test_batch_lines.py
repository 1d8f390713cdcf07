"""What is read from the input of a batch, and what its output's lines look like."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agentray.models.batch_lines import (
    MAX_FAULTS,
    MAX_LINE_BYTES,
    InputReader,
    answer,
    asks_for_stream,
    failure,
    usage_of,
)
from agentray.storage.batches import LineUsage, NewLine

CHAT = "/v1/chat/completions"
BATCH = "batch_" + "0" * 26


def line(custom_id: Any = "a", **changes: Any) -> bytes:
    fields = {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": {"n": 1}, **changes}
    kept = {key: value for key, value in fields.items() if value is not ...}
    return json.dumps(kept).encode()


def read(
    *pieces: bytes, max_requests: int = 1_000, endpoint: str = CHAT
) -> tuple[list[NewLine], InputReader]:
    reader = InputReader(BATCH, endpoint, max_requests=max_requests)
    found = [new for piece in pieces for new in reader.feed(piece)]
    return [*found, *reader.close()], reader


def faults(*pieces: bytes, **how: Any) -> list[tuple[str, int | None, str | None]]:
    return [(fault.code, fault.line, fault.param) for fault in read(*pieces, **how)[1].faults]


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_lines_are_the_same_however_the_file_is_cut(size: int) -> None:
    text = b"\n".join([line("a"), line("b", body={"text": "ü\n"}), b"", line("c")]) + b"\n"
    lines, reader = read(*(text[i : i + size] for i in range(0, len(text), size)))
    assert [new.number for new in lines] == [1, 2, 4]
    assert [json.loads(new.body) for new in lines] == [{"n": 1}, {"text": "ü\n"}, {"n": 1}]
    assert (reader.total, reader.faults) == (3, [])


def test_a_byte_order_mark_carriage_returns_and_blank_lines_do_not_matter() -> None:
    lines, reader = read(b"\xef\xbb\xbf" + line("a") + b"\r\n  \r\n" + line("b"))
    assert [new.number for new in lines] == [1, 3]
    assert reader.total == 2


def test_a_result_begins_with_an_id_of_its_own_and_the_custom_id() -> None:
    [first, second], _ = read(line('"quoted" ü') + b"\n" + line("b"))
    shown = [json.loads(new.head + failure("code", "why")) for new in (first, second)]
    assert shown[0]["custom_id"] == '"quoted" ü'
    assert shown[0]["id"] != shown[1]["id"]
    assert shown[0]["id"].startswith("batch_req_")


@pytest.mark.parametrize(
    ("bad", "code", "param"),
    [
        (b"{broken", "invalid_json_line", None),
        (b"[]", "invalid_json_line", None),
        (b"\xff", "invalid_json_line", None),
        (b"[" * 100_000, "invalid_json_line", None),
        (line(...), "missing_required_parameter", "custom_id"),
        (line(method=...), "missing_required_parameter", "method"),
        (line(url=...), "missing_required_parameter", "url"),
        (line(body=...), "missing_required_parameter", "body"),
        (line(7), "invalid_type", "custom_id"),
        (line(None), "invalid_type", "custom_id"),
        (line(method="GET"), "invalid_method", "method"),
        (line(url="/v1/embeddings"), "url_mismatch", "url"),
        (line(body=[]), "invalid_type", "body"),
        (line(""), "invalid_custom_id", "custom_id"),
        (line("x" * 513), "invalid_custom_id", "custom_id"),
        (line("first"), "duplicate_custom_id", "custom_id"),
        (b"x" * (MAX_LINE_BYTES + 1), "line_too_long", None),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_line_that_cannot_be_a_request_is_named(bad: bytes, code: str, param: str | None) -> None:
    assert faults(line("first") + b"\n" + bad + b"\n" + line("last")) == [(code, 2, param)]


def test_a_lone_surrogate_is_no_text() -> None:
    bad = line("first").replace(b'"first"', b'"\\ud800"')
    assert [code for code, _, _ in faults(bad)] in (["invalid_json_line"], ["invalid_type"])


@pytest.mark.parametrize("empty", [(), (b"",), (b"\n\n \n",)])
def test_a_file_without_requests_is_a_fault(empty: tuple[bytes, ...]) -> None:
    assert faults(*empty) == [("empty_file", None, None)]


def test_too_many_requests_are_one_fault() -> None:
    text = b"\n".join(line(str(i)) for i in range(5))
    assert faults(text, max_requests=3) == [("too_many_tasks", None, None)]
    assert faults(text, max_requests=5) == []


def test_reading_on_is_given_up_when_enough_is_wrong() -> None:
    _, reader = read(b"broken\n" * (MAX_FAULTS + 10))
    assert reader.given_up
    assert len(reader.faults) == MAX_FAULTS


def test_an_answer_stays_one_line_however_it_is_laid_out() -> None:
    body = b'{\n  "choices": [ {"text": "a\\nb"} ]\n}\n'
    rest = answer(BATCH, 3, 1, 200, body)
    assert rest.count(b"\n") == 1
    found = json.loads(b'{"id":"x"' + rest)
    assert found["error"] is None
    assert found["response"]["status_code"] == 200
    assert found["response"]["body"] == {"choices": [{"text": "a\nb"}]}
    assert (
        found["response"]["request_id"]
        != json.loads(b'{"id":"x"' + answer(BATCH, 3, 2, 200, body))["response"]["request_id"]
    )


@pytest.mark.parametrize("body", [b"<html>\n\xff", b"", b"{"])
def test_an_answer_that_is_no_json_is_a_text_in_its_line(body: bytes) -> None:
    found = json.loads(b'{"id":"x"' + answer(BATCH, 3, 1, 502, body))
    assert found["response"]["body"] == body.decode("utf-8", "replace")


def test_a_line_that_was_never_asked_has_an_error_and_no_response() -> None:
    found = json.loads(b'{"id":"x"' + failure("batch_expired", "too late"))
    assert found == {
        "id": "x",
        "response": None,
        "error": {"code": "batch_expired", "message": "too late"},
    }


@pytest.mark.parametrize(
    ("body", "asks"),
    [
        (b'{"stream": true}', True),
        (b'{"stream": 1}', True),
        (b'{"stream": false}', False),
        (b'{"stream": null}', False),
        (b"{}", False),
        (b"{broken", False),
    ],
)
def test_a_request_for_a_stream_is_known(body: bytes, asks: bool) -> None:
    assert asks_for_stream(body) is asks


@pytest.mark.parametrize(
    ("body", "usage"),
    [
        (
            b"""{"usage": {"prompt_tokens": 5, "completion_tokens": 7,
                 "prompt_tokens_details": {"cached_tokens": 2},
                 "completion_tokens_details": {"reasoning_tokens": 3}}}""",
            LineUsage(5, 2, 7, 3),
        ),
        (b'{"usage": {"prompt_tokens": 5, "total_tokens": 5}}', LineUsage(5)),
        (b'{"usage": {"prompt_tokens": 1, "prompt_tokens_details": {}}}', LineUsage(1)),
        (b'{"usage": null}', LineUsage()),
        (b'{"usage": "much"}', LineUsage()),
        (
            b"""{"usage": {"prompt_tokens": 5, "completion_tokens": 7.5,
                 "prompt_tokens_details": {"cached_tokens": 9},
                 "completion_tokens_details": {"reasoning_tokens": -3}}}""",
            LineUsage(5, 5),
        ),
        (
            b'{"usage": {"prompt_tokens": 99999999999999999999, "completion_tokens": 2}}',
            LineUsage(0, 0, 2),
        ),
        (b'{"usage": {"prompt_tokens": -5, "completion_tokens": 2}}', LineUsage(0, 0, 2)),
        (b"[]", LineUsage()),
    ],
)
def test_usage_is_what_the_answer_says(body: bytes, usage: LineUsage) -> None:
    assert usage_of(body) == usage
