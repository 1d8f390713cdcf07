"""Try again what could not be done, with growing pauses, until that has taken too long."""

from __future__ import annotations

import asyncio

from agentray.clock import Clock

__all__ = ["Patience"]

_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0


class Patience:
    """``for_s`` is how long all tries together may take that nothing answered."""

    def __init__(self, clock: Clock, for_s: float) -> None:
        self._clock = clock
        self._for_s = for_s
        self.restart()

    @property
    def ends_at(self) -> float:
        return self._since + self._for_s

    @property
    def is_over(self) -> bool:
        return self._clock.monotonic() >= self.ends_at

    def restart(self) -> None:
        """Something answered: what fails from here on is a new trouble."""
        self._since = self._clock.monotonic()
        self._pause_s = _PAUSE_S

    def answered(self, after_s: float) -> None:
        """Something took so long to answer: that was no trouble."""
        self._since += after_s

    async def pause(self) -> None:
        """Wait before the next try."""
        await asyncio.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
