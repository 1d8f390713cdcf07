"""A call as its host sees it: where it may have begun, where it waits, and who is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from agentray.tools.messages import Queued
from agentray.tools.runner import Ask

__all__ = ["AskedCall", "OnQueued"]

OnQueued = Callable[[int, float], None]
"""Is told where the call stands, 1 for the next to begin, and the wait expected in seconds; now
and then also where nothing is new."""

# Not all calls of a long queue are told of often: what is known is told again.
_TOLD_EVERY_S = 10.0


class AskedCall:
    """A call that waits: for a slot, or for its result.

    ``was_at`` is the worker that it may have begun at, ``began`` whether that was reached since
    the call was granted last; ``ends_at`` is when it waits no longer for a slot, 0 for never.
    """

    __slots__ = (
        *("ask", "asked_at", "ends_at", "waited_s", "was_at", "began"),
        *("_on_queued", "_on_granted", "_place", "_told_at", "_answer"),
    )

    def __init__(
        self,
        ask: Ask,
        asked_at: float,
        on_queued: OnQueued | None,
        on_granted: Callable[[], None] | None,
    ) -> None:
        self.ask = ask
        self.asked_at = asked_at
        self.ends_at = 0.0
        self.waited_s: float | None = None
        self.was_at = ""
        self.began = False
        self._on_queued = on_queued
        self._on_granted = on_granted
        self._place: Queued | None = None
        self._told_at = 0.0
        self._answer: asyncio.Future[Any] | None = None

    def queued(self, place: Queued, now: float) -> None:
        """It waits at a place."""
        self._place, self._told_at = place, now
        if self._on_queued is not None:
            self._on_queued(place.position, place.wait_s)

    def waits_still(self, now: float) -> None:
        """It waits, where it was told of last as far as is known."""
        if self._place is not None and now - self._told_at >= _TOLD_EVERY_S:
            self.queued(self._place, now)

    def granted(self, now: float) -> None:
        """It has a slot."""
        self._place = None
        if self.waited_s is None:
            self.waited_s = now - self.asked_at
        if self._on_granted is not None:
            self._on_granted()

    def answer(self, answer: Any) -> None:
        """Give whoever waits in ``answered`` an answer, the first one."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(answer)

    async def answered(self) -> Any:
        """Wait for the answer to what was just asked."""
        self._answer = asyncio.get_running_loop().create_future()
        try:
            return await self._answer
        finally:
            self._answer = None
