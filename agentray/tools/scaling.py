"""Decide how many workers there are, by what waits and who is idle. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from agentray.config.worker_settings import ToolWorkersSettings

__all__ = ["Idle", "Scaling"]


# Opening runners takes seconds, a process on a busy machine a minute.
_COMES_S = 120.0


class Idle(msgspec.Struct, frozen=True):
    """A worker by its actor's name, and since when it has had nothing to do; None if it has."""

    name: str
    since: float | None


class Scaling:
    """Adds a worker when the wait has been long for a while, removes one that has long been idle.

    One at a time: a process takes seconds to start, and until it is there the wait tells nothing
    about whether it was enough.
    """

    def __init__(self, settings: ToolWorkersSettings) -> None:
        self._settings = settings
        self._long_since: float | None = None
        self._away_since: dict[str, float] = {}

    def overdue(self, now: float, names: Collection[str], there: Collection[str]) -> list[str]:
        """Return those of the started workers that have not been there for too long.

        Ray has no place for them, or nobody told it to start them anew. While they count as on
        their way, no other one is started.
        """
        away = [name for name in names if name not in there]
        self._away_since = {name: self._away_since.get(name, now) for name in away}
        return [name for name in away if now - self._away_since[name] >= _COMES_S]

    def decide(
        self, *, now: float, nodes: int, started: int, workers: Sequence[Idle], wait_s: float
    ) -> str:
        """Return ``"add"``, the name of the worker to be removed, or ``""`` for neither.

        ``started`` counts workers that are there or on their way, ``workers`` are those that have
        registered; ``wait_s`` is what a new call has to expect.
        """
        least = self._settings.min or nodes
        most = max(least, self._settings.max)
        if started < least:
            return "add"
        if wait_s <= self._settings.up_after_wait_s:
            self._long_since = None
        elif self._long_since is None:
            self._long_since = now
        if self._long_since is not None:
            coming = started > len(workers)
            due = now - self._long_since >= self._settings.up_delay_s
            if due and not coming and started < most:
                self._long_since = None
                return "add"
            return ""
        if started > least:
            for worker in workers:
                idle_s = 0.0 if worker.since is None else now - worker.since
                if idle_s >= self._settings.down_after_idle_s:
                    return worker.name
        return ""
