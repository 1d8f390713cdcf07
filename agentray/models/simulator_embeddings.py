"""Answer embeddings without a model: the same unit vector for the same text, always."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Sequence
from hashlib import shake_256
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

__all__ = ["EmbeddingError", "embed"]

DIMENSIONS = 64
_CHARS_PER_TOKEN = 4

Tokens = Annotated[list[int], Meta(min_length=1)]
Text = Annotated[str, Meta(min_length=1)]


class EmbeddingError(ValueError):
    """A request that is not one for embeddings."""


class _Request(msgspec.Struct):
    input: Text | Annotated[list[Text | int | Tokens], Meta(min_length=1, max_length=2048)]
    model: str = ""
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Meta(ge=1, le=4096)] = DIMENSIONS


_request = msgspec.json.Decoder(_Request)


def embed(body: bytes) -> bytes:
    """Return the answer to a body for ``/v1/embeddings``.

    Raises:
        EmbeddingError: it is not one.
    """
    try:
        request = _request.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise EmbeddingError(str(error)) from error
    inputs = _inputs(request.input)
    vectors = [_vector(_bytes_of(one), request.dimensions) for one in inputs]
    tokens = sum(_tokens(one) for one in inputs)
    shown: list[Any] = vectors
    if request.encoding_format == "base64":
        shown = [base64.b64encode(struct.pack(f"<{len(v)}f", *v)).decode() for v in vectors]
    return msgspec.json.encode(
        {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": vector}
                for index, vector in enumerate(shown)
            ],
            "model": request.model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )


def _inputs(given: str | Sequence[str | int | list[int]]) -> list[str | list[int]]:
    if isinstance(given, str):
        return [given]
    numbers = [one for one in given if isinstance(one, int)]
    if len(numbers) == len(given):
        return [numbers]
    if numbers:
        raise EmbeddingError("input: expected texts, tokens, or lists of tokens, and not a mixture")
    return [one for one in given if not isinstance(one, int)]


def _bytes_of(one: str | list[int]) -> bytes:
    return one.encode() if isinstance(one, str) else b"tokens:" + repr(one).encode()


def _tokens(one: str | list[int]) -> int:
    return len(one) if isinstance(one, list) else math.ceil(len(one) / _CHARS_PER_TOKEN)


def _vector(text: bytes, dimensions: int) -> list[float]:
    digest = shake_256(text).digest(4 * dimensions)
    raw = [value + 0.5 for value in struct.unpack(f"<{dimensions}i", digest)]
    length = math.sqrt(sum(value * value for value in raw))
    return [value / length for value in raw]
