"""Keep the calls that wait or run at hand: by key, lease, session, host and deadline. Pure."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator

from agentray.tools.cost import Estimate
from agentray.tools.fair_queue import Call
from agentray.tools.messages import Want

__all__ = ["CallBook", "Entry"]


class Entry:
    """A call that waits or runs.

    ``link`` is the host's connection that waits for it, if one does. ``lease`` is 0 while it
    waits; ``confirmed`` once its worker has told of it. ``held``: it waits for the fate of a
    worker that may have it. ``ending``: it is being killed; ``next`` is who asked for it since:
    link, question and deadline.
    """

    __slots__ = (
        *("call", "estimate", "charged", "want", "link", "deadline"),
        *("lease", "worker", "granted_at", "confirmed", "held", "ending", "next"),
    )

    def __init__(self, want: Want, link: str, call: Call, estimate: Estimate, deadline: float):
        self.want = want
        self.link = link
        self.call = call
        self.estimate = estimate
        self.deadline = deadline
        self.lease = 0
        self.worker = ""
        self.granted_at = self.charged = 0.0
        self.confirmed = self.held = self.ending = False
        self.next: tuple[str, Want, float] | None = None


class CallBook:
    """The calls that wait or run."""

    def __init__(self) -> None:
        self._by_key: dict[str, Entry] = {}
        self.leases: dict[int, Entry] = {}
        self._sessions: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
        self._deadlines: list[tuple[float, str]] = []

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._by_key.values()))

    def get(self, key: str) -> Entry | None:
        return self._by_key.get(key)

    def of_session(self, session: tuple[str, str]) -> list[Entry]:
        """Return a session's calls."""
        return [self._by_key[key] for key in self._sessions.get(session, ())]

    def note(self, entry: Entry) -> None:
        """Take a call in."""
        want = entry.want
        self._by_key[want.key] = entry
        self._sessions[want.tenant, want.session_id].add(want.key)
        self.due(entry, entry.deadline)

    def due(self, entry: Entry, deadline: float) -> None:
        """Have a call's deadline at a time, or none for 0."""
        entry.deadline = deadline
        if deadline:
            heapq.heappush(self._deadlines, (deadline, entry.want.key))

    def strike(self, entry: Entry) -> None:
        """Forget a call."""
        want = entry.want
        del self._by_key[want.key]
        self.leases.pop(entry.lease, None)
        keys = self._sessions[want.tenant, want.session_id]
        keys.discard(want.key)
        if not keys:
            del self._sessions[want.tenant, want.session_id]

    def expired(self, now: float) -> Iterator[Entry]:
        """Yield calls that still wait at their deadline."""
        while self._deadlines and self._deadlines[0][0] <= now:
            entry = self._by_key.get(heapq.heappop(self._deadlines)[1])
            if entry is not None and not entry.lease and 0 < entry.deadline <= now:
                yield entry
