"""End calls: drop those that wait, kill those that run, and tell fences when it is done. Pure."""

from __future__ import annotations

from agentray.tools.call_book import CallBook, Entry
from agentray.tools.fair_queue import Queue
from agentray.tools.fences import Fences, Session
from agentray.tools.messages import Fence, Fenced, Kill, Refused, Revoke
from agentray.tools.outbox import Outbox
from agentray.tools.roster import Roster

__all__ = ["Endings"]

_LEAST_RETRY_S = 1.0


class Endings:
    """How the scheduler's calls end, other than by themselves."""

    def __init__(self, queue: Queue, calls: CallBook, roster: Roster, out: Outbox) -> None:
        self._queue = queue
        self._calls = calls
        self._roster = roster
        self._out = out
        self._fences = Fences()

    def drop(self, entry: Entry) -> None:
        """A call without a lease waits no longer."""
        self._queue.remove(entry.call.key)
        self._calls.strike(entry)

    def refuse(self, entry: Entry, reason: str) -> None:
        """Drop a call, and tell its host why."""
        retry_s = 0.0
        if reason == "queue_full":
            place = self._queue.last_place(entry.call, self._roster.slots)
            retry_s = max(_LEAST_RETRY_S, place.wait_s)
        self.drop(entry)
        self._out.send(entry.link, Refused(entry.want.key, reason, retry_s))

    def end(self, entry: Entry) -> None:
        """Drop a call that waits, kill one that runs."""
        if not entry.lease:
            self.drop(entry)
            return
        entry.ending = True
        # Its host may not have begun it, and may never.
        self._out.send(entry.worker, Revoke(entry.lease))
        self._out.send(entry.worker, Kill(entry.want.key, entry.want.epoch))

    def is_older(self, session: Session, epoch: int) -> bool:
        """Whether a newer epoch of the session has been heard of."""
        return epoch < self._fences.epoch(session)

    def end_older(self, session: Session, epoch: int) -> None:
        """End the calls of a session's older epochs."""
        self._fences.heard(session, epoch)
        for entry in self._calls.of_session(session):
            if entry.want.epoch < epoch and entry.lease:
                self.end(entry)
            elif entry.want.epoch < epoch:
                self.refuse(entry, "refused")

    def fence(self, link: str, fence: Fence) -> None:
        """End older calls, for a host that is told when they have ended."""
        session = (fence.tenant, fence.session_id)
        self.end_older(session, fence.epoch)
        self._fences.wait(link, fence.number, session, fence.epoch)

    def host_left(self, link: str) -> None:
        """A host is gone, and whatever it was to be told."""
        self._fences.left(link)

    def settle_fences(self, now: float) -> None:
        """Tell those whose calls have all ended."""
        if not self._roster.settled(now):
            # What older epochs run may still be told of.
            return

        def is_over(session: Session, epoch: int) -> bool:
            calls = self._calls.of_session(session)
            return not any(entry.lease and entry.want.epoch < epoch for entry in calls)

        for link, number in self._fences.settle(is_over):
            self._out.send(link, Fenced(number))
