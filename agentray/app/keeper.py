"""Keep a part of the system running: bring it back when it dies, and know when to give up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from agentray.app.report import Report
from agentray.errors import AgentRayError, NotReadyError

__all__ = ["keep"]

_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 15.0
_FAILURES = 6
_STEADY_S = 60.0


async def keep(
    name: str,
    *,
    wait_dead: Callable[[], Awaitable[str]],
    restart: Callable[[], Awaitable[None]],
    report: Report,
) -> None:
    """Wait until a part dies and restart it, for ever; the pause doubles with each failure.

    A failure is a restart that raised, or a part that died within a minute of its restart.

    Raises:
        NotReadyError: after too many failures in a row.
    """
    failures = 0
    while True:
        began = time.monotonic()
        reason = await wait_dead()
        if time.monotonic() - began > _STEADY_S:
            failures = 0
        while True:
            report.warn(f"{name}: {reason}; bringing it back")
            await asyncio.sleep(min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**failures))
            failures += 1
            try:
                done = report.begin(name)
                await restart()
                done("is back")
            except AgentRayError as error:
                reason = error.message
                if failures >= _FAILURES:
                    raise NotReadyError(
                        f"{name} could not be kept running, {failures} failures in a row: {reason}"
                    ) from error
            else:
                break
        if failures >= _FAILURES:
            raise NotReadyError(f"{name} died {failures} times in a row, the last time: {reason}")
