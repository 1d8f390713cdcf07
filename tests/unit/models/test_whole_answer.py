"""What counts as an answer, of what came whole."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agentray.errors import ModelError, ModelUnavailableError
from agentray.models.whole_answer import is_completion, is_embeddings, is_error

DEEP = b"[" * 100_000


def completion(*choices: tuple[dict[str, Any] | None, str | None]) -> bytes:
    found = [{"message": message, "finish_reason": reason} for message, reason in choices]
    return json.dumps({"choices": found}).encode()


NOTHING: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": []}


@pytest.mark.parametrize(
    "something",
    [
        {"content": "yes"},
        {"content": [{"type": "text", "text": "yes"}]},
        {"refusal": "I will not"},
        {"tool_calls": [{"id": "c"}]},
        {"function_call": {"name": "f"}},
        {"audio": {"data": "AAAA"}},
        {"reasoning": "hm"},
        {"reasoning_content": "hm"},
    ],
)
@pytest.mark.parametrize("reason", ["stop", "tool_calls", "something_else", None])
def test_whatever_is_in_it_is_an_answer(something: dict[str, Any], reason: str | None) -> None:
    assert is_completion("m", completion((NOTHING | something, reason)))


@pytest.mark.parametrize("message", [NOTHING, {}, None, {"content": ""}])
def test_nothing_at_all_is_an_empty_answer(message: dict[str, Any] | None) -> None:
    with pytest.raises(ModelUnavailableError, match="empty answer") as caught:
        is_completion("m", completion((message, "stop")))
    assert caught.value.fields == {"model": "m", "empty": True}


def test_an_answer_that_reached_its_limit_with_nothing_said_is_whole() -> None:
    assert is_completion("m", completion((NOTHING, "length")))


def test_an_answer_that_was_withheld_is_not_worth_another_call() -> None:
    with pytest.raises(ModelError, match="withheld") as caught:
        is_completion("m", completion((NOTHING, "content_filter")))
    assert not caught.value.retryable


@pytest.mark.parametrize("reason", ["error", "abort", "aborted"])
def test_an_answer_that_its_endpoint_broke_off_is_none(reason: str) -> None:
    with pytest.raises(ModelUnavailableError, match="broke its answer off"):
        is_completion("m", completion(({"content": "half an"}, reason)))


def test_one_of_several_that_says_something_is_an_answer() -> None:
    assert is_completion("m", completion((NOTHING, "stop"), ({"content": "yes"}, "stop")))
    with pytest.raises(ModelUnavailableError, match="empty answer"):
        is_completion("m", completion((NOTHING, "stop"), (NOTHING, "stop")))


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"choices": []}', b"\xff", DEEP])
def test_something_else_is_no_answer(body: bytes) -> None:
    assert not is_completion("m", body)
    assert not is_embeddings(body)
    assert not is_error(body)
