"""Turn rows of a database into JSON, up to so many rows and bytes: pure."""

from __future__ import annotations

import base64
import datetime
import decimal
import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, cast

import msgspec

from agentray.errors import StorageError
from agentray.storage.sql_base import Column

__all__ = ["Rows"]

_CUT = "…[cut]"
# What is around columns and rows: their names, counts, brackets.
_FRAME_BYTES = 100
_encode = msgspec.json.Encoder().encode


class Rows:
    """The rows of a result that its bounds let through, each encoded once.

    ``max_bytes`` is for all of the result as JSON, the names of its columns among it.
    Numbers, booleans and JSON stay what they are. Decimals are strings, so that none of their
    digits is lost; dates and times are ISO 8601; bytes are ``{"base64": "…"}``; all else is its
    text.
    """

    def __init__(self, columns: Sequence[Column], max_rows: int, max_bytes: int) -> None:
        """Begin a result.

        Raises:
            StorageError: its columns alone have more bytes.
        """
        self._max_rows = max_rows
        self._left_bytes = max_bytes - len(_encode(columns)) - _FRAME_BYTES
        if self._left_bytes < 0:
            problem = f"the columns' names alone make the result larger than {max_bytes} bytes"
            raise StorageError(f"{problem}; select fewer, with shorter names", reason="output")
        self._size_bytes = 0
        self.encoded: list[msgspec.Raw] = []
        self.truncated = False

    def add(self, row: Sequence[Any]) -> bool:
        """Take a row; return False if it, or a part of it, is past the bounds: no more is wanted.

        Of a first row that is too large by itself, the beginning of its values is taken, or
        nothing where there are too many of them.
        """
        if len(self.encoded) >= self._max_rows:
            self.truncated = True
            return False
        encoded = _encode([_value(value) for value in row])
        # Each has a comma behind it.
        left = self._left_bytes - self._size_bytes - 1
        if len(encoded) > left:
            self.truncated = True
            if self.encoded:
                return False
            share = (left - 2) // max(1, len(row)) - 1
            encoded = _encode([_cut(_value(value), share) for value in row])
            if len(encoded) > left:
                return False
        self._size_bytes += len(encoded) + 1
        self.encoded.append(msgspec.Raw(encoded))
        return not self.truncated

    def next_batch(self, most: int) -> int:
        """Return how many rows to fetch next: about as many as fit, by the size of those so far,
        and one more, which tells whether there is more."""
        if not self.encoded:
            return 1
        left = self._left_bytes - self._size_bytes
        fitting = left * len(self.encoded) // self._size_bytes
        return max(1, min(most, fitting + 1, self._max_rows - len(self.encoded) + 1))


def _value(value: Any) -> Any:
    match value:
        case None | bool() | int() | str() | msgspec.Raw():
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case decimal.Decimal():
            return str(value)
        case datetime.date() | datetime.time():
            return value.isoformat()
        case bytes() | bytearray() | memoryview():
            return {"base64": base64.b64encode(bytes(cast("bytes", value))).decode()}
        case list() | tuple():
            return [_value(item) for item in cast("list[Any]", value)]
        case dict():
            items = cast("dict[Any, Any]", value).items()
            return {str(key): _value(item) for key, item in items}
        case _:
            return str(value)


def _cut(value: Any, size_bytes: int) -> Any:
    encoded = _encode(value)
    if len(encoded) <= size_bytes:
        return value
    if len(_encode(_CUT)) > size_bytes:
        return None
    text = value if isinstance(value, str) else encoded.decode(errors="replace")
    # As much as is no longer when it is escaped.
    most = range(1, min(len(text), size_bytes) + 1)
    kept = bisect_right(most, size_bytes, key=lambda size: len(_encode(text[:size] + _CUT)))
    return text[:kept] + _CUT
