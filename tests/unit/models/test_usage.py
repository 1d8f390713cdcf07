"""Tokens as endpoints say them, well and badly, and as prompts suggest them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agentray.events import Usage
from agentray.models.usage import MOST_TOKENS, prompt_bytes, reasoning_in, tokens, usage_of


@pytest.mark.parametrize(
    ("said", "usage"),
    [
        ({"prompt_tokens": 5, "completion_tokens": 3}, Usage(5, 3)),
        ({"prompt_tokens": 5.0}, Usage(5)),
        ({"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": 2}}, Usage(5, 0, 2)),
        ({"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": 2_000}}, Usage(5, 0, 5)),
        ({"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": -1}}, Usage(5)),
        ({"prompt_tokens": 5, "prompt_tokens_details": [7]}, Usage(5)),
        ({"prompt_tokens": -1, "completion_tokens": -7}, Usage()),
        ({"prompt_tokens": 12.5, "completion_tokens": 3}, Usage(0, 3)),
        ({"prompt_tokens": "12", "completion_tokens": True}, Usage()),
        ({"prompt_tokens": 10**40, "completion_tokens": MOST_TOKENS + 1}, Usage()),
        ({"prompt_tokens": MOST_TOKENS}, Usage(MOST_TOKENS)),
        ({"prompt_tokens": None}, Usage()),
        ([], Usage()),
        ("1", Usage()),
        (1, Usage()),
        (None, Usage()),
    ],
)
def test_usage_is_what_can_be_of_what_is_said(said: Any, usage: Usage) -> None:
    assert usage_of(json.dumps({"choices": [], "usage": said}).encode()) == usage


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"[]",
        b"\xff",
        b'{"usage": {"prompt_tokens": 1e999}}',
        b'{"usage": {"\xff": 1}}',
        b'{"usage": ' + b"[" * 100_000,
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_cannot_be_read_says_nothing(answer: bytes) -> None:
    assert usage_of(answer) == Usage()


@pytest.mark.parametrize("said", [float("nan"), float("inf"), {}, False])
def test_no_number_is_no_count(said: object) -> None:
    assert tokens(said) == 0


@pytest.mark.parametrize(
    ("said", "count"),
    [
        ({"completion_tokens_details": {"reasoning_tokens": 3}}, 3),
        ({"completion_tokens_details": {"reasoning_tokens": -3}}, 0),
        ({"completion_tokens_details": 3}, 0),
        (3, 0),
    ],
)
def test_thoughts_are_counted_where_they_are_said(said: object, count: int) -> None:
    assert reasoning_in(said) == count


def message(text: str, *urls: str) -> bytes:
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    parts += [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return json.dumps({"role": "user", "content": parts}).encode()


def test_images_count_as_a_thousand_tokens_each_however_large_they_are() -> None:
    image = "data:image/png;base64," + "A" * 4_000_000
    text = "x" * 8_000
    assert 16_000 <= prompt_bytes([message(text, image, image)]) < 16_300
    assert prompt_bytes([message("a", image), message(text)]) < 12_400


@pytest.mark.parametrize("url", ["http://h/" + "i" * 9_000, "data:image/png;base64,AAAA"])
def test_an_address_and_a_small_image_count_as_they_are(url: str) -> None:
    plain = message("x" * 5_000, url)
    assert prompt_bytes([plain, b"{}"]) == len(plain) + 2
