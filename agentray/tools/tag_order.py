"""Order those who share something by virtual time: one level of start-time fair queuing.

Each one's tag is the virtual time at which its next call begins; who has the least is first. One
that comes and owes nothing begins now, whatever now turns out to be: it goes before those that
wait already, once, and has its tag from then on. Were it given one when it comes, what others are
given back afterwards would put them before it. While nobody waits, time goes on to the greatest
tag: nobody owes for what others did not want.

Pure; the least is found in logarithmic time.
"""

from __future__ import annotations

import heapq
from typing import Generic, TypeVar

__all__ = ["Entrant", "TagOrder"]


class Entrant:
    """One that may wait. Among those that come and owe nothing, the lowest ``rank`` is first."""

    __slots__ = ("entry", "is_new", "rank", "tag")

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank
        self.tag = 0.0
        # The number of its entry in a heap that counts; 0 while it does not wait.
        self.entry = 0
        self.is_new = False


E = TypeVar("E", bound=Entrant)


class TagOrder(Generic[E]):
    """Those that wait, in order."""

    __slots__ = ("_count", "_entries", "_floor", "_heap", "_new", "_now", "_top")

    def __init__(self) -> None:
        self._now = 0.0
        # The greatest tag so far, and what it was when nobody waited last.
        self._top = self._floor = 0.0
        self._heap: list[tuple[float, int, int, E]] = []
        self._new: list[tuple[int, int, E]] = []
        self._entries = self._count = 0

    def first(self) -> E | None:
        """Return whose turn it is, or None if nobody waits."""
        new = self._new
        while new and (new[0][2].entry != new[0][1] or not new[0][2].is_new):
            heapq.heappop(new)
        return new[0][2] if new else self._least()

    def enter(self, one: E) -> None:
        """Let one wait, unless it does."""
        if one.entry:
            return
        if not self._count:
            self._now = self._floor = self._top
        self._count += 1
        if self.owes(one):
            self._push(one)
            return
        self._entries += 1
        one.entry, one.is_new = self._entries, True
        heapq.heappush(self._new, (one.rank, one.entry, one))

    def leave(self, one: E) -> None:
        """Let one wait no longer; it keeps its tag."""
        if one.entry:
            self._count -= 1
            one.entry, one.is_new = 0, False

    def begin(self, one: E) -> None:
        """It was one's turn: virtual time goes on to its tag."""
        self._settle(one)
        self._now = max(self._now, one.tag)

    def charge(self, one: E, time: float) -> None:
        """Move one's tag on; back if ``time`` is less than nothing, but not behind what it owed
        when nobody waited last: that is owed no more."""
        if time > 0:
            self._settle(one)
        one.tag = max(one.tag + time, self._floor)
        self._top = max(self._top, one.tag)
        if one.entry and not one.is_new:
            self._push(one)

    def owes(self, one: E) -> bool:
        """Whether one that comes now has to wait for what it has used."""
        return one.tag > self.begins()

    def tag(self, one: E) -> float:
        """Return the virtual time at which one's next call begins, as far as is known."""
        return max(one.tag, self.begins()) if one.is_new else one.tag

    def begins(self) -> float:
        """Return the tag of one that comes now and owes nothing."""
        # Who was given something back is behind: who comes does not wait until it has caught up.
        least = self._least()
        return self._now if least is None else min(self._now, least.tag)

    def _settle(self, one: E) -> None:
        if one.is_new:
            one.tag, one.is_new = self.tag(one), False
            self._push(one)

    def _least(self) -> E | None:
        heap = self._heap
        while heap and heap[0][3].entry != heap[0][2]:
            heapq.heappop(heap)
        return heap[0][3] if heap else None

    def _push(self, one: E) -> None:
        self._entries += 1
        one.entry = self._entries
        heap = self._heap
        heapq.heappush(heap, (one.tag, one.rank, one.entry, one))
        if len(heap) > 64 + 4 * self._count:
            # Each charge leaves an entry behind that no longer counts.
            heap[:] = [each for each in heap if each[3].entry == each[2]]
            heapq.heapify(heap)
