"""The simulator's embeddings."""

from __future__ import annotations

import base64
import json
import math
import struct
from typing import Any

import pytest

from agentray.models.simulator_embeddings import EmbeddingError, embed


def vectors(given: Any, **fields: Any) -> list[Any]:
    answer = json.loads(embed(json.dumps({"model": "m", "input": given, **fields}).encode()))
    assert [one["index"] for one in answer["data"]] == list(range(len(answer["data"])))
    return [one["embedding"] for one in answer["data"]]


def test_the_same_text_has_the_same_unit_vector_and_another_text_another() -> None:
    [one], [again, other] = vectors("a text"), vectors(["a text", "another"])
    assert one == again != other
    assert math.sqrt(sum(x * x for x in one)) == pytest.approx(1.0)
    assert abs(sum(x * y for x, y in zip(one, other, strict=True))) < 0.9


def test_dimensions_are_as_many_as_asked_for() -> None:
    assert len(vectors("a", dimensions=3)[0]) == 3


def test_both_formats_say_the_same() -> None:
    [floats], [text] = vectors("a"), vectors("a", encoding_format="base64")
    raw = base64.b64decode(text)
    assert struct.unpack(f"<{len(raw) // 4}f", raw) == pytest.approx(floats)


def test_tokens_are_one_input_or_lists_of_them_several() -> None:
    assert len(vectors([1, 2, 3])) == 1
    assert vectors([1, 2, 3]) == vectors([[1, 2, 3]])
    assert len(vectors([[1], [2]])) == 2


def test_usage_is_counted() -> None:
    answer = json.loads(embed(b'{"input": ["12345678", [1, 2, 3]]}'))
    assert answer["usage"] == {"prompt_tokens": 5, "total_tokens": 5}


@pytest.mark.parametrize("given", ["", [], [""], [[]], ["a", 1], [1, [2]], None, {"a": 1}])
def test_what_is_no_input_is_refused(given: Any) -> None:
    with pytest.raises(EmbeddingError):
        vectors(given)
