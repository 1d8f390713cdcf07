"""Decide who gets a slot, and what becomes of calls whose worker, host or scheduler is lost.

The brain of the scheduler: events go in, messages to be sent come out. A call is known by its
key; while it waits, runs, or has a result that a worker keeps, whoever asks for it again is led
there instead of having it run twice. A lease belongs to a session's epoch: a newer epoch fences
what older ones have waiting or running. A worker that is given up counts as dead: one that is only
cut off may run on what others run by then. Pure; times are in seconds of one clock.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from msgspec.structs import replace

from agentray.tools.call_book import CallBook, Entry
from agentray.tools.cost import Estimates, SlotShare
from agentray.tools.endings import Endings
from agentray.tools.fair_queue import Call, Queue
from agentray.tools.messages import (
    Fence,
    Finished,
    Gone,
    Held,
    Kill,
    Left,
    Queued,
    Refused,
    Register,
    Revoke,
    State,
    Want,
    Welcome,
)
from agentray.tools.metering import Metering
from agentray.tools.outbox import Outbox, Send
from agentray.tools.roster import Roster, WorkerState

__all__ = ["Leases"]

# A lease that its worker has not heard of by then is taken back. The files of eight calls may be
# on their way to it, one after the other.
_START_S = 10.0
_MAX_PLACES = 200


class Leases:
    """All calls of the pool. Each method returns what is to be sent, in order."""

    def __init__(
        self, queue: Queue, estimates: Estimates, slot: SlotShare, roster: Roster, first_lease: int
    ) -> None:
        self._queue = queue
        self._meter = Metering(queue, estimates, slot)
        self.roster = roster
        self._first_lease = first_lease
        self._numbers = itertools.count(first_lease)
        self._calls = CallBook()
        self._leases = self._calls.leases
        self._out = Outbox()
        self._endings = Endings(queue, self._calls, roster, self._out)

    # What hosts say

    def want(self, link: str, want: Want, now: float) -> list[Send]:
        """A call is asked for, or asked for again."""
        self._ask(link, want, now + want.left_s if want.left_s > 0 else 0.0, now)
        self._dispatch(now)
        entry = self._calls.get(want.key)
        if entry is not None and not entry.lease:
            place = self._queue.last_place(entry.call, self.roster.slots)
            self._out.send(link, Queued(want.key, place.position, place.wait_s))
        return self._out.take()

    def left(self, link: str, left: Left, now: float) -> list[Send]:
        """A host waits no longer for a call."""
        entry = self._calls.get(left.key)
        if entry is not None and entry.want.epoch <= left.epoch:
            if entry.next is not None and entry.next[1].epoch <= left.epoch:
                entry.next = None
            self._endings.end(entry)
        self._dispatch(now)
        return self._out.take()

    def fence(self, link: str, fence: Fence, now: float) -> list[Send]:
        """End what a session's older epochs have; ``Fenced`` is sent when all of it has ended."""
        self._endings.fence(link, fence)
        self._endings.settle_fences(now)
        self._dispatch(now)
        return self._out.take()

    def host_left(self, link: str, now: float) -> list[Send]:
        """A host's connection broke: what it waited for is dropped, what runs goes on."""
        self._out.left(link)
        self._endings.host_left(link)
        for entry in self._calls:
            if entry.next is not None and entry.next[0] == link:
                entry.next = None
            if entry.link != link:
                continue
            if entry.lease:
                entry.link = ""
                if not entry.confirmed:
                    # It may never have got there.
                    self._out.send(entry.worker, Revoke(entry.lease))
            else:
                self._endings.drop(entry)
        self._dispatch(now)
        return self._out.take()

    # What workers say

    def registered(self, register: Register, now: float) -> list[Send]:
        """A worker is there, for the first time or again, and says what it has."""
        if self.roster.is_dead(register.worker):
            # Its calls were given up or run elsewhere: it has to begin anew.
            self._out.send(register.worker, Gone(register.worker))
            return self._out.take()
        for old in self.roster.register(register, now):
            self._bury(old, now)
        self._out.send(register.worker, Welcome(self._first_lease))
        worker = self.roster.workers[register.worker]
        self.roster.forget(worker, worker.kept)
        self._keep(worker, register.kept)
        found = {held.lease for held in register.held}
        for lease in worker.leases - found:
            entry = self._leases[lease]
            if entry.confirmed or entry.call.key in worker.kept:
                # It ended while nobody was connected.
                self._release(entry, worker, now)
        for held in register.held:
            self._adopt(worker, held, now)
        for entry in [self._leases[lease] for lease in worker.leases]:
            if entry.ending:
                # What was said while it was away did not arrive, or it is known only now.
                self._endings.end(entry)
            self._lead_on(entry)
        self._retry_held(now)
        self._endings.settle_fences(now)
        self._dispatch(now)
        return self._out.take()

    def finished(self, worker_id: str, finished: Finished, now: float) -> list[Send]:
        """A worker's call ended; what it used is charged."""
        worker = self.roster.workers.get(worker_id)
        if worker is None:
            return []
        if finished.kept:
            self._keep(worker, [finished.key])
        entry = self._leases.get(finished.lease)
        if entry is not None:
            self._meter.ended(entry, finished)
            self._release(entry, worker, now)
        self._dispatch(now)
        return self._out.take()

    def alive(self, worker_id: str, leases: Iterable[int], now: float) -> list[Send]:
        """A worker beats: leases that never came to it are taken back."""
        worker = self.roster.workers.get(worker_id)
        if worker is None:
            return []
        worker.seen_at = now
        begun = set(leases)
        for lease in list(worker.leases):
            entry = self._leases[lease]
            if lease in begun:
                entry.confirmed = True
            elif entry.confirmed:
                # Its end should have been told before this.
                self._meter.runs(entry, now)
                self._release(entry, worker, now)
            elif now - entry.granted_at >= _START_S:
                self._out.send(worker_id, Revoke(lease))
        self._dispatch(now)
        return self._out.take()

    def forgot(self, worker_id: str, keys: Iterable[str]) -> None:
        """A worker keeps these results no longer."""
        if (worker := self.roster.workers.get(worker_id)) is not None:
            self.roster.forget(worker, keys)

    def revoked(self, lease: int, now: float) -> list[Send]:
        """A lease was void before it began: the slot is free, and nothing was used."""
        entry = self._leases.get(lease)
        if entry is not None:
            self._meter.never_began(entry)
            self._release(entry, self.roster.workers[entry.worker], now)
            self._dispatch(now)
        return self._out.take()

    def worker_lost(self, worker_id: str, now: float) -> None:
        """A worker's connection broke; whether it is dead is still to be seen."""
        if (worker := self.roster.workers.get(worker_id)) is not None:
            self.roster.lost(worker, now)

    def worker_died(self, worker_id: str, now: float) -> list[Send]:
        """A worker is dead: its leases are given back, and whoever asks again is told."""
        if (worker := self.roster.workers.get(worker_id)) is not None:
            self._bury(worker, now)
            self._retry_held(now)
            self._dispatch(now)
        return self._out.take()

    # What time does

    def sweep(self, now: float) -> list[Send]:
        """Charge what runs, drop what waited too long, give up workers that stay away."""
        for entry in self._leases.values():
            self._meter.runs(entry, now)
        for entry in self._calls.expired(now):
            self._endings.refuse(entry, "died" if entry.want.was_at else "expired")
        for worker in self.roster.given_up(now):
            self._bury(worker, now)
        self._retry_held(now)
        self._endings.settle_fences(now)
        self._dispatch(now)
        return self._out.take()

    def places(self) -> list[Send]:
        """Tell those who wait where they stand."""
        for key, place in self._queue.places(self.roster.slots, _MAX_PLACES):
            if (entry := self._calls.get(key)) is not None:
                self._out.send(entry.link, Queued(key, place.position, place.wait_s))
        return self._out.take()

    def state(self) -> State:
        """Return how the pool is."""
        workers = sum(worker.connected for worker in self.roster.workers.values())
        return State(len(self._queue), len(self._leases), workers, self.roster.slots)

    def queued_s(self) -> float:
        """Return how long the slots need for what waits for a slot, and for nothing else."""
        return self._queue.runnable_s() / max(1, self.roster.slots)

    # How

    def _ask(self, link: str, want: Want, deadline: float, now: float) -> None:
        session = (want.tenant, want.session_id)
        if self._endings.is_older(session, want.epoch):
            self._out.send(link, Refused(want.key, "refused"))
            return
        entry = self._calls.get(want.key)
        if entry is not None and entry.lease and entry.link != link:
            # The other host may have begun it.
            want = replace(want, was_at=entry.worker)
        if entry is not None and not entry.ending:
            # It is this epoch's now, and not ended with those of older ones.
            if entry.link != link and not entry.lease:
                self._out.send(entry.link, Refused(want.key, "refused"))
            entry.link, entry.want = link, want
            self._calls.due(entry, deadline)
        self._endings.end_older(session, want.epoch)
        if entry is not None:
            if entry.lease:
                if entry.next is not None and entry.next[0] != link:
                    self._out.send(entry.next[0], Refused(want.key, "refused"))
                entry.next = (link, want, deadline)
                self._lead_on(entry)
        elif (keeper := self.roster.keeper(want.key)) is None:
            self._place(link, want, deadline, now)
        elif keeper.connected:
            self._out.grant(link, want.key, keeper, 0)
        else:
            self._hold(link, replace(want, was_at=keeper.id), deadline)

    def _place(self, link: str, want: Want, deadline: float, now: float) -> None:
        """A call that nobody runs, nor keeps the result of, as far as is known."""
        if self._undecided(want.was_at, now):
            self._hold(link, want, deadline)
        elif want.was_at and want.on_crash == "report":
            # It may have begun, and nobody has its result.
            self._out.send(link, Refused(want.key, "died"))
        else:
            self._enqueue(link, want, deadline)

    def _keep(self, worker: WorkerState, keys: Sequence[str]) -> None:
        """A worker keeps these results: lead those there who wait for a slot."""
        self.roster.keep(worker, keys)
        for key in keys:
            entry = self._calls.get(key)
            if entry is not None and not entry.lease:
                self._endings.drop(entry)
                self._out.grant(entry.link, key, worker, 0)

    def _lead_on(self, entry: Entry) -> None:
        """Lead who asks for a call with a lease to it, unless it ends or its worker is away."""
        worker = self.roster.workers[entry.worker]
        if entry.next is not None and not entry.ending and worker.connected:
            link = entry.next[0]
            entry.next = None
            self._out.grant(link, entry.want.key, worker, 0 if entry.confirmed else entry.lease)

    def _undecided(self, worker: str, now: float) -> bool:
        if not worker or self.roster.is_dead(worker):
            return False
        found = self.roster.workers.get(worker)
        return not self.roster.settled(now) if found is None else not found.connected

    def _entry(self, link: str, want: Want, deadline: float) -> Entry:
        estimate = self._meter.expected(want)
        call = Call(want.key, want.tenant, want.priority, estimate.cost, estimate.wall_s)
        return Entry(want, link, call, estimate, deadline)

    def _enqueue(self, link: str, want: Want, deadline: float) -> None:
        entry = self._entry(link, want, deadline)
        self._calls.note(entry)
        refused = self._queue.add(entry.call)
        if refused is not None:
            found = self._calls.get(refused.key)
            assert found is not None
            self._endings.refuse(found, "queue_full")

    def _hold(self, link: str, want: Want, deadline: float) -> None:
        entry = self._entry(link, want, deadline)
        entry.held = True
        self._calls.note(entry)

    def _retry_held(self, now: float) -> None:
        """Look again at calls that waited for a worker's fate."""
        for entry in [entry for entry in self._calls if entry.held]:
            if not self._undecided(entry.want.was_at, now):
                self._endings.drop(entry)
                self._ask(entry.link, entry.want, entry.deadline, now)

    def _dispatch(self, now: float) -> None:
        if not self.roster.settled(now):
            # What they run may be what is asked for.
            return
        while (worker := self.roster.choose()) is not None and (call := self._queue.pop()):
            entry = self._calls.get(call.key)
            assert entry is not None
            self._meter.began(entry)
            self._lease(entry, worker, next(self._numbers), now)
            self._out.grant(entry.link, call.key, worker, entry.lease)

    def _lease(self, entry: Entry, worker: WorkerState, lease: int, granted_at: float) -> None:
        entry.lease, entry.worker, entry.granted_at = lease, worker.id, granted_at
        worker.leases.add(lease)
        self._leases[lease] = entry

    def _adopt(self, worker: WorkerState, held: Held, now: float) -> None:
        """Take a call over that runs already, unless it is ours or runs elsewhere by now."""
        if (ours := self._leases.get(held.lease)) is not None:
            ours.confirmed = True
            ours.ending = ours.ending or held.killed
            return
        session = (held.tenant, held.session_id)
        self._endings.end_older(session, held.epoch)
        known = self._calls.get(held.key)
        if known is not None and known.lease:
            self._out.send(worker.id, Kill(held.key, held.epoch))
            return
        link, want = "", _want_of(held)
        if known is not None:
            self._endings.drop(known)
            if not held.killed:
                # Who asks for it, of a newer epoch perhaps, is led to it.
                link, want = known.link, known.want
        entry = self._entry(link, want, 0.0)
        entry.charged, entry.confirmed = entry.call.cost, True
        if held.killed and known is not None:
            entry.next = known.link, replace(known.want, was_at=worker.id), known.deadline
        self._calls.note(entry)
        self._queue.began(entry.call)
        self._lease(entry, worker, held.lease, now - held.ran_s)
        if held.killed or self._endings.is_older(session, want.epoch):
            entry.ending = True
        elif link:
            self._out.grant(link, held.key, worker, 0)

    def _release(self, entry: Entry, worker: WorkerState, now: float) -> None:
        """A lease is over, and its slot free."""
        worker.leases.discard(entry.lease)
        worker.idle_since = now
        self._queue.ended(entry.call)
        self._calls.strike(entry)
        self._endings.settle_fences(now)
        if entry.next is not None:
            self._ask(*entry.next, now)

    def _bury(self, worker: WorkerState, now: float) -> None:
        self.roster.died(worker)
        for lease in list(worker.leases):
            entry = self._leases[lease]
            if entry.next is not None and entry.confirmed:
                link, want, deadline = entry.next
                entry.next = link, replace(want, was_at=worker.id), deadline
            self._meter.runs(entry, now)
            self._release(entry, worker, now)
        self._out.gone(worker.id)


def _want_of(held: Held) -> Want:
    """Return what was asked for, as far as its worker tells."""
    return Want(
        *(held.key, held.tenant, held.session_id, held.epoch, held.tool, held.priority),
        *(0.0, 0, 0.0, 0.0, held.on_crash),
    )
