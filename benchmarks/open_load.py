"""Drive a service with requests that keep to a schedule, whether or not answers keep up.

``python -m benchmarks.open_load`` serves the rounds of ``benchmarks.load``. In one with a
``rate``, requests are due at equal distances; the connection that has waited longest sends the
next one. Latency counts from when a request was due, so one that waits for a connection is late
by that as well. A round without a rate is a closed loop as ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence

from benchmarks.answers import WrongAnswerError
from benchmarks.load import MAX_ERRORS, Measured, Round, Turn, drive, http, now, serve


class _Schedule:
    """The requests of a round: each comes into ``due`` when it is."""

    def __init__(self, rate: float, seconds: float) -> None:
        self._rate = rate
        self._count = max(1, int(rate * seconds))
        self._loop = asyncio.get_running_loop()
        self.due: asyncio.Queue[float | None] = asyncio.Queue()
        self.began = now()

    def keep(self, lanes: int) -> None:
        """Put in what is due; in a thread, whose sleeps are finer than the loop's timers."""
        for number in range(self._count):
            at = self.began + number / self._rate
            while (left := at - now()) > 0:
                time.sleep(left)
            self._loop.call_soon_threadsafe(self.due.put_nowait, at)
        for _ in range(lanes):
            self._loop.call_soon_threadsafe(self.due.put_nowait, None)


async def drive_on_schedule(turns: Sequence[Turn], spec: Round) -> Measured:
    """Send what is due; ``seconds`` of the result are those of the schedule and its last turn."""
    if spec.rate is None:
        return await drive(turns, spec)
    ms: list[float] = []
    first_ms: list[float] = []
    errors: list[str] = []
    schedule = _Schedule(spec.rate, spec.seconds)
    last = schedule.began

    async def lane(turn: Turn) -> None:
        nonlocal last
        while (at := await schedule.due.get()) is not None and len(errors) < MAX_ERRORS:
            try:
                async with asyncio.timeout(spec.timeout_s):
                    first = await turn()
            except (WrongAnswerError, OSError, TimeoutError) as error:
                errors.append(f"{type(error).__name__}: {error}"[:500])
                continue
            last = now()
            ms.append(round((last - at) * 1000, 4))
            first_ms.append(round((first - at) * 1000, 4))

    cpu_s = time.process_time()
    async with asyncio.TaskGroup() as group:
        group.create_task(asyncio.to_thread(schedule.keep, len(turns)))
        for turn in turns:
            group.create_task(lane(turn))
    cpu_s = time.process_time() - cpu_s
    span_s = max(last - schedule.began, 1e-9)
    return Measured(len(ms), span_s, len(ms) / span_s, ms, first_ms, cpu_s, errors)


def main() -> None:
    import uvloop

    with contextlib.suppress(KeyboardInterrupt):
        serve(http, uvloop.run, drive_on_schedule)


if __name__ == "__main__":
    main()
