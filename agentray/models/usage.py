"""Count the tokens of a call: as its answer says, whatever it says, or guessed from its prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import msgspec

from agentray.events import Usage

__all__ = [
    "BYTES_PER_TOKEN",
    "MOST_TOKENS",
    "has_image",
    "prompt_bytes",
    "reasoning_in",
    "tokens",
    "usage_in",
    "usage_of",
    "usage_said",
]

MOST_TOKENS = 1_000_000_000
"""A count of tokens that is larger is none: sums of what is below fit every column and metric."""

BYTES_PER_TOKEN = 4
"""Of a message's JSON, where its tokens are not counted by a model yet: for estimates alone."""

# What an image is taken to have, for estimates alone: 1,000 tokens of four bytes.
_IMAGE_BYTES = 4_000
_IMAGE_URL = re.compile(rb'"url"\s*:\s*"data:[^"]*"')


class _Answer(msgspec.Struct):
    usage: Any = None


_answer = msgspec.json.Decoder(_Answer)


def tokens(said: object) -> int:
    """Return a count of tokens that an endpoint says; 0 for what can be none."""
    if isinstance(said, float) and said.is_integer():
        said = int(said)
    return said if type(said) is int and 0 <= said <= MOST_TOKENS else 0


def usage_in(said: object) -> Usage:
    """Return what the ``usage`` of an answer says, whatever it is: it never raises.

    Cached tokens are a part of the input ones, also where the endpoint says more.
    """
    counts = _object(said)
    prompt_tokens = tokens(counts.get("prompt_tokens"))
    cached_tokens = tokens(_object(counts.get("prompt_tokens_details")).get("cached_tokens"))
    return Usage(
        input_tokens=prompt_tokens,
        output_tokens=tokens(counts.get("completion_tokens")),
        cached_tokens=min(cached_tokens, prompt_tokens),
    )


def reasoning_in(said: object) -> int:
    """Return the tokens of its thoughts that the ``usage`` of an answer says, as ``usage_in``."""
    details = _object(_object(said).get("completion_tokens_details"))
    return tokens(details.get("reasoning_tokens"))


def usage_said(answer: bytes) -> object:
    """Return the ``usage`` of an answer's JSON as it is there; None for what has none."""
    try:
        return _answer.decode(answer).usage
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def usage_of(answer: bytes) -> Usage:
    """Return the tokens that an answer's JSON says it took; none where it says nothing that can
    be. It never raises."""
    return usage_in(usage_said(answer))


def prompt_bytes(messages: Sequence[bytes]) -> int:
    """Return how large messages are in their JSON, to estimate their tokens by: an image that is
    within them counts as much as its tokens would, not as its bytes do."""
    sizes = list(map(len, messages))
    if not sizes or max(sizes) <= _IMAGE_BYTES:
        return sum(sizes)
    return sum(map(_text_bytes, messages))


def estimate(prompt: Sequence[bytes], said: int) -> Usage:
    """Return what a call that did not end has used, which nobody counted: nothing is known if it
    said nothing. ``said`` is the characters of its text."""
    if not said:
        return Usage()
    return Usage(prompt_bytes(prompt) // BYTES_PER_TOKEN, -(-said // BYTES_PER_TOKEN))


def has_image(message: bytes) -> bool:
    """Return whether there is an image in a message's JSON, or in several's."""
    return b'"image_url"' in message


def _text_bytes(message: bytes) -> int:
    urls = _IMAGE_URL.finditer(message) if len(message) > _IMAGE_BYTES else ()
    return len(message) - sum(max(0, url.end() - url.start() - _IMAGE_BYTES) for url in urls)


def _object(said: object) -> Mapping[str, object]:
    return cast("Mapping[str, object]", said) if isinstance(said, Mapping) else {}
