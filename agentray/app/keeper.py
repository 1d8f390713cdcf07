"""Keep a part of the system running: bring it back when it dies, and know when to give up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from agentray.app.report import Report
from agentray.errors import AgentRayError, NotReadyError

__all__ = ["Patience", "keep"]


class Patience:
    """How long to wait before the next try, and how often to try in a row.

    A part that lived for a minute has shown that it can: what failed before is forgotten.
    """

    FIRST_PAUSE_S = 0.2
    LONGEST_PAUSE_S = 15.0
    TRIES = 6
    STEADY_S = 60.0

    def __init__(self) -> None:
        self.tries = 0

    def lived(self, seconds: float) -> None:
        """Take note of how long the part ran before it died."""
        if seconds >= self.STEADY_S:
            self.tries = 0

    def next_pause_s(self) -> float | None:
        """Return the pause before the next try, None when there shall be none."""
        if self.tries == self.TRIES:
            return None
        self.tries += 1
        return min(self.LONGEST_PAUSE_S, self.FIRST_PAUSE_S * 2 ** (self.tries - 1))


async def keep(
    name: str,
    *,
    wait_dead: Callable[[], Awaitable[str]],
    restart: Callable[[], Awaitable[None]],
    report: Report,
) -> None:
    """Wait until a part dies and bring it back, for ever.

    Raises:
        NotReadyError: after too many failures in a row; a part that dies soon is a failure too.
    """
    patience = Patience()
    while True:
        began = time.monotonic()
        reason = await wait_dead()
        patience.lived(time.monotonic() - began)
        while reason:
            pause_s = patience.next_pause_s()
            if pause_s is None:
                raise NotReadyError(
                    f"{name} failed {patience.tries} times in a row, the last time: {reason}"
                )
            report.warn(f"{name}: {reason}; bringing it back")
            await asyncio.sleep(pause_s)
            done = report.begin(name)
            try:
                await restart()
            except AgentRayError as error:
                reason = error.message
            else:
                reason = ""
                done("is back")
