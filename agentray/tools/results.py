"""Keep finished results until they have arrived, so that nobody has to run a call twice. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import msgspec

from agentray.tools.spec import ToolResult

__all__ = ["Kept", "Results"]

_OVERHEAD_BYTES = 500


class Kept(msgspec.Struct, frozen=True):
    """A result, how long its call ran, and when it ended."""

    result: ToolResult
    wall_s: float
    at: float

    @property
    def size_bytes(self) -> int:
        return _OVERHEAD_BYTES + len(self.result.output) + len(self.result.scratch or b"")


class Results:
    """Results by the key of their call, bounded in bytes and age.

    One that has arrived stays a while: its host may die before it has journaled it. When room is
    needed those go first, the oldest before the others.
    """

    def __init__(self, *, max_bytes: int, arrived_s: float, lost_s: float) -> None:
        self._max_bytes = max_bytes
        self._arrived_s = arrived_s
        self._lost_s = lost_s
        self._unread: OrderedDict[str, Kept] = OrderedDict()
        self._read: OrderedDict[str, Kept] = OrderedDict()
        self._size = 0

    def __iter__(self) -> Iterator[str]:
        yield from self._unread
        yield from self._read

    def get(self, key: str) -> Kept | None:
        return self._unread.get(key) or self._read.get(key)

    def keep(self, key: str, kept: Kept) -> list[str]:
        """Take a result in; return the keys of those that made room for it, itself perhaps."""
        self._discard(key)
        self._unread[key] = kept
        self._size += kept.size_bytes
        dropped: list[str] = []
        while self._size > self._max_bytes:
            oldest = next(iter(self._read or self._unread))
            self._discard(oldest)
            dropped.append(oldest)
        return dropped

    def arrived(self, key: str) -> None:
        """A result has reached the host that asked for it."""
        if (kept := self._unread.pop(key, None)) is not None:
            self._read[key] = kept

    def expire(self, now: float) -> list[str]:
        """Drop what is too old; return the keys."""
        dropped = [
            key
            for which, age_s in ((self._read, self._arrived_s), (self._unread, self._lost_s))
            for key, kept in which.items()
            if now - kept.at >= age_s
        ]
        for key in dropped:
            self._discard(key)
        return dropped

    def clear(self) -> None:
        """Drop everything."""
        self._unread.clear()
        self._read.clear()
        self._size = 0

    def _discard(self, key: str) -> None:
        for which in (self._unread, self._read):
            if (kept := which.pop(key, None)) is not None:
                self._size -= kept.size_bytes
