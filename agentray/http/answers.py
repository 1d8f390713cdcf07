"""Remember which creates were answered to their last byte from this process."""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeVar

from agentray.clock import Clock

__all__ = ["Answers"]

T = TypeVar("T")


class Answers:
    """The turns answered whole, and the requests asked anew; the latest ``limit`` of each.

    An answer that was handed to the connection whole may still be lost behind it. Only for as
    long as its client would pause before it asks again, and not if it asked anew meanwhile:
    then it had the answer.
    """

    def __init__(self, clock: Clock, *, limit: int = 10_000) -> None:
        self._clock = clock
        self._limit = limit
        # An order, for the clock may stand still between two of them.
        self._order = 0
        self._given: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._asked: OrderedDict[str, int] = OrderedDict()

    def asked(self, fingerprint: str) -> None:
        """Note that a request came that is no repetition."""
        self._put(self._asked, fingerprint, self._next())

    def given(self, turn_id: str) -> None:
        """Note that the request which made a turn was answered whole."""
        self._put(self._given, turn_id, (self._next(), self._clock.monotonic()))

    def had(self, turn_id: str, fingerprint: str, pause_s: float) -> bool:
        """Return whether a client that asks again after at most ``pause_s`` had that answer."""
        given = self._given.get(turn_id)
        if given is None:
            return False
        order, at = given
        return self._asked.get(fingerprint, 0) > order or self._clock.monotonic() - at > pause_s

    def _next(self) -> int:
        self._order += 1
        return self._order

    def _put(self, known: OrderedDict[str, T], key: str, value: T) -> None:
        known[key] = value
        known.move_to_end(key)
        if len(known) > self._limit:
            known.popitem(last=False)
