from __future__ import annotations

from typing import Any

import msgspec
import pytest

from agentray.models.continuation import Continuation, can_go_on


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 1, "logprobs": False, "stream": True, "temperature": 1.0},
        {"n": None, "response_format": {"type": "text"}},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
    ],
)
def test_one_plain_text_can_be_put_together(fields: dict[str, Any]) -> None:
    assert can_go_on(fields)
    assert can_go_on({name: msgspec.Raw(msgspec.json.encode(fields[name])) for name in fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2},
        {"logprobs": True},
        {"logprobs": 3},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {}}},
        {"structured_outputs": {"regex": "a"}},
        {"guided_json": {}},
        {"continue_final_message": True},
        {"echo": True},
        {"n": "two"},
    ],
)
def test_what_has_parts_of_its_own_or_a_form_cannot(fields: dict[str, Any]) -> None:
    assert not can_go_on(fields)
    assert not can_go_on({name: msgspec.Raw(msgspec.json.encode(fields[name])) for name in fields})


@pytest.mark.parametrize("said", ["1", 12.5, [], -3])
def test_tokens_that_cannot_be_do_not_break_a_stream_that_goes_on(said: Any) -> None:
    usage = {"prompt_tokens": said, "completion_tokens": said}
    line = b"data: " + msgspec.json.encode({"choices": [], "usage": usage})
    nothing: Any = None
    continuation = Continuation(
        nothing,
        nothing,
        nothing,
        model="m",
        route=nothing,
        fields={},
        session_id=None,
        deadline=0.0,
        failures=0,
    )
    joined = continuation._joined(line, {"id": "c1"})
    assert msgspec.json.decode(joined[5:]) == {
        "id": "c1",
        "choices": [],
        "usage": {"prompt_tokens": 0, "completion_tokens": 0},
    }
