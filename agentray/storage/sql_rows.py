"""Turn rows of a database into JSON, up to so many rows and bytes: pure."""

from __future__ import annotations

import base64
import datetime
import decimal
import math
from collections.abc import Sequence
from typing import Any, cast

import msgspec

__all__ = ["Rows"]

_CUT = "…[cut]"
_encode = msgspec.json.Encoder().encode


class Rows:
    """The rows of a result that its bounds let through, each encoded once.

    Numbers, booleans and JSON stay what they are. Decimals are strings, so that none of their
    digits is lost; dates and times are ISO 8601; bytes are ``{"base64": "…"}``; all else is its
    text.
    """

    def __init__(self, max_rows: int, max_bytes: int) -> None:
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self.encoded: list[msgspec.Raw] = []
        self.size_bytes = 0
        self.truncated = False

    def add(self, row: Sequence[Any]) -> bool:
        """Take a row; return False if it, or a part of it, is past the bounds: no more is wanted.

        Of a first row that is too large by itself, the beginning of its values is taken.
        """
        if len(self.encoded) >= self._max_rows:
            self.truncated = True
            return False
        encoded = _encode([_value(value) for value in row])
        left = self._max_bytes - self.size_bytes
        if len(encoded) > left:
            self.truncated = True
            if self.encoded:
                return False
            share = max(1, left // max(1, len(row)))
            encoded = _encode([_cut(_value(value), share) for value in row])
        self.size_bytes += len(encoded) + 1
        self.encoded.append(msgspec.Raw(encoded))
        return not self.truncated

    def next_batch(self, most: int) -> int:
        """Return how many rows to fetch next: about as many as fit, by the size of those so far,
        and one more, which tells whether there is more."""
        if not self.encoded:
            return 1
        fitting = (self._max_bytes - self.size_bytes) * len(self.encoded) // self.size_bytes
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
    text = value if isinstance(value, str) else encoded.decode(errors="replace")
    return text.encode()[:size_bytes].decode(errors="ignore") + _CUT
