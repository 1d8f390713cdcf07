"""Decide who gets a slot, and what becomes of calls whose worker, host or scheduler is lost.

The brain of the scheduler: events go in, messages to be sent come out. A call is known by its
key; while it waits, runs, or has a result that a worker keeps, whoever asks for it again is led
there instead of having it run twice. A lease belongs to a session's epoch: a newer epoch fences
what older ones have waiting or running. Pure; times are in seconds of one clock.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict, defaultdict
from collections.abc import Iterable

import msgspec
from msgspec.structs import replace

from agentray.tools.call_book import CallBook, Entry
from agentray.tools.cost import Estimates, SlotShare, call_cost
from agentray.tools.fair_queue import Call, Queue
from agentray.tools.messages import (
    Fence,
    Fenced,
    Finished,
    Gone,
    Granted,
    Held,
    Kill,
    Left,
    Message,
    Queued,
    Refused,
    Register,
    Revoke,
    State,
    Want,
)
from agentray.tools.roster import Roster, WorkerState

__all__ = ["Leases", "Send"]

# A lease that its worker has not heard of by then is taken back.
_START_S = 2.0
_LEAST_RETRY_S = 1.0
_MAX_PLACES = 200
_MAX_EPOCHS = 50_000


class Send(msgspec.Struct, frozen=True):
    """Something to be sent to a host's connection, or to a worker by its id."""

    to: str
    message: Message


class Leases:
    """All calls of the pool. Each method returns what is to be sent, in order."""

    def __init__(
        self, queue: Queue, estimates: Estimates, slot: SlotShare, roster: Roster, first_lease: int
    ) -> None:
        self._queue = queue
        self._estimates = estimates
        self._slot = slot
        self.roster = roster
        self._numbers = itertools.count(first_lease)
        self._calls = CallBook()
        self._leases = self._calls.leases
        self._kept: dict[str, str] = {}
        self._epochs: OrderedDict[tuple[str, str], int] = OrderedDict()
        self._fences: dict[tuple[str, int], set[int]] = {}
        self._told: defaultdict[str, set[str]] = defaultdict(set)
        self._out: list[Send] = []

    # What hosts say

    def want(self, link: str, want: Want, now: float) -> list[Send]:
        """A call is asked for, or asked for again."""
        self._ask(link, want, now)
        self._dispatch(now)
        entry = self._calls.get(want.key)
        if entry is not None and not entry.lease:
            place = self._queue.last_place(entry.call, self.roster.slots)
            self._send(link, Queued(want.key, place.position, place.wait_s))
        return self._flush()

    def left(self, link: str, left: Left, now: float) -> list[Send]:
        """A host waits no longer for a call."""
        entry = self._calls.get(left.key)
        if entry is not None and entry.want.epoch <= left.epoch:
            entry.next = None
            self._end(entry)
        self._dispatch(now)
        return self._flush()

    def fence(self, link: str, fence: Fence, now: float) -> list[Send]:
        """End what a session's older epochs have; ``Fenced`` is sent when all of it has ended."""
        ending = self._end_older((fence.tenant, fence.session_id), fence.epoch)
        self._fences[link, fence.number] = ending
        self._settle_fences()
        self._dispatch(now)
        return self._flush()

    def host_left(self, link: str, now: float) -> list[Send]:
        """A host's connection broke: what it waited for is dropped, what runs goes on."""
        self._told.pop(link, None)
        for fence in [key for key in self._fences if key[0] == link]:
            del self._fences[fence]
        for entry in self._calls:
            if entry.next is not None and entry.next[0] == link:
                entry.next = None
            if entry.link != link:
                continue
            if entry.lease:
                entry.link = ""
            else:
                self._drop(entry)
        self._dispatch(now)
        return self._flush()

    # What workers say

    def registered(self, register: Register, now: float) -> list[Send]:
        """A worker is there, for the first time or again, and says what it has."""
        if self.roster.is_dead(register.worker):
            # Its calls were given up or run elsewhere: it has to begin anew.
            self._send(register.worker, Gone(register.worker))
            return self._flush()
        for old in self.roster.register(register, now):
            self._bury(old, now)
        worker = self.roster.workers[register.worker]
        self._forget(worker, worker.kept)
        self._keep(worker, register.kept)
        found = {held.lease for held in register.held}
        for lease in worker.leases - found:
            entry = self._leases[lease]
            if entry.confirmed or entry.call.key in worker.kept:
                # It ended while nobody was connected.
                self._release(entry, worker, now)
        for held in register.held:
            self._adopt(worker, held, now)
        for lease in worker.leases:
            self._lead_on(self._leases[lease])
        self._retry_held(now)
        self._dispatch(now)
        return self._flush()

    def finished(self, worker_id: str, finished: Finished, now: float) -> list[Send]:
        """A worker's call ended; what it used is charged."""
        worker = self.roster.workers.get(worker_id)
        if worker is None:
            return []
        if finished.kept:
            self._keep(worker, [finished.key])
        entry = self._leases.get(finished.lease)
        if entry is not None:
            cost = call_cost(finished.wall_s, finished.cpu_s, finished.memory_bytes, self._slot)
            self._charge(entry, cost)
            if not finished.killed:
                call = entry.call
                self._estimates.learn(
                    call.tenant, entry.want.tool, wall_s=finished.wall_s, cost=cost
                )
            self._release(entry, worker, now)
        self._dispatch(now)
        return self._flush()

    def alive(self, worker_id: str, leases: Iterable[int], now: float) -> list[Send]:
        """A worker beats: leases that never came to it are taken back."""
        worker = self.roster.workers.get(worker_id)
        if worker is None:
            return []
        worker.seen_at = now
        begun = set(leases)
        for lease in worker.leases:
            entry = self._leases[lease]
            if lease in begun:
                entry.confirmed = True
            elif not entry.confirmed and now - entry.granted_at >= _START_S:
                self._send(worker_id, Revoke(lease))
        return self._flush()

    def forgot(self, worker_id: str, keys: Iterable[str]) -> None:
        """A worker keeps these results no longer."""
        if (worker := self.roster.workers.get(worker_id)) is not None:
            self._forget(worker, keys)

    def revoked(self, lease: int, now: float) -> list[Send]:
        """A lease was void before it began: the slot is free, and nothing was used."""
        entry = self._leases.get(lease)
        if entry is not None:
            self._charge(entry, 0.0)
            self._release(entry, self.roster.workers[entry.worker], now)
            self._dispatch(now)
        return self._flush()

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
        return self._flush()

    # What time does

    def sweep(self, now: float) -> list[Send]:
        """Charge what runs, drop what waited too long, give up workers that stay away."""
        for entry in self._leases.values():
            self._accrue(entry, now)
        for entry in self._calls.expired(now):
            self._refuse(entry, "expired")
        for worker in self.roster.given_up(now):
            self._bury(worker, now)
        self._retry_held(now)
        self._dispatch(now)
        return self._flush()

    def places(self) -> list[Send]:
        """Tell those who wait where they stand."""
        for key, place in self._queue.places(self.roster.slots, _MAX_PLACES):
            if (entry := self._calls.get(key)) is not None:
                self._send(entry.link, Queued(key, place.position, place.wait_s))
        return self._flush()

    def state(self) -> State:
        """Return how the pool is."""
        workers = sum(worker.connected for worker in self.roster.workers.values())
        return State(len(self._queue), len(self._leases), workers, self.roster.slots)

    def queued_s(self) -> float:
        """Return how long the slots need for what waits."""
        waiting = (entry for entry in self._calls if not entry.lease)
        return sum(entry.call.wall_s for entry in waiting) / max(1, self.roster.slots)

    # How

    def _ask(self, link: str, want: Want, now: float) -> None:
        session = (want.tenant, want.session_id)
        known = self._epochs.get(session, want.epoch)
        if want.epoch < known:
            self._send(link, Refused(want.key, "refused"))
            return
        entry = self._calls.get(want.key)
        if entry is not None and not entry.ending:
            # It is this epoch's now, and not ended with those of older ones.
            entry.link, entry.want = link, want
        self._end_older(session, want.epoch)
        if entry is not None:
            if entry.lease:
                entry.next = (link, want)
                self._lead_on(entry)
        elif keeper := self._kept.get(want.key):
            worker = self.roster.workers[keeper]
            if worker.connected:
                self._grant(link, want.key, worker, 0)
            else:
                self._hold(link, replace(want, was_at=keeper), now)
        elif self._undecided(want.was_at, now):
            self._hold(link, want, now)
        elif want.was_at and want.was_at not in self.roster.workers and want.on_crash == "report":
            self._send(link, Refused(want.key, "died"))
        else:
            self._enqueue(link, want, now)

    def _lead_on(self, entry: Entry) -> None:
        """Lead who asks for a call with a lease to it, unless it ends or its worker is away."""
        worker = self.roster.workers[entry.worker]
        if entry.next is not None and not entry.ending and worker.connected:
            link, _ = entry.next
            entry.next = None
            self._grant(link, entry.want.key, worker, 0 if entry.confirmed else entry.lease)

    def _undecided(self, worker: str, now: float) -> bool:
        if not worker or self.roster.is_dead(worker):
            return False
        found = self.roster.workers.get(worker)
        return not self.roster.settled(now) if found is None else not found.connected

    def _entry(self, link: str, want: Want, now: float) -> Entry:
        estimate = self._estimates.of(
            want.tenant,
            want.tool,
            cpu=want.cpu,
            memory_bytes=want.memory_bytes,
            timeout_s=want.timeout_s,
        )
        call = Call(want.key, want.tenant, want.priority, estimate.cost, estimate.wall_s)
        deadline = now + want.left_s if want.left_s > 0 else 0.0
        return Entry(want, link, call, estimate, deadline)

    def _enqueue(self, link: str, want: Want, now: float) -> None:
        entry = self._entry(link, want, now)
        self._calls.note(entry)
        refused = self._queue.add(entry.call)
        if refused is not None:
            found = self._calls.get(refused.key)
            assert found is not None
            self._refuse(found, "queue_full")

    def _hold(self, link: str, want: Want, now: float) -> None:
        entry = self._entry(link, want, now)
        entry.held = True
        self._calls.note(entry)

    def _retry_held(self, now: float) -> None:
        """Look again at calls that waited for a worker's fate."""
        for entry in [entry for entry in self._calls if entry.held]:
            if not self._undecided(entry.want.was_at, now):
                self._drop(entry)
                self._ask(entry.link, entry.want, now)

    def _dispatch(self, now: float) -> None:
        if not self.roster.settled(now):
            # What they run may be what is asked for.
            return
        while (worker := self.roster.choose()) is not None and (call := self._queue.pop()):
            entry = self._calls.get(call.key)
            assert entry is not None
            entry.charged = call.cost
            self._lease(entry, worker, next(self._numbers), now)
            self._grant(entry.link, call.key, worker, entry.lease)

    def _lease(self, entry: Entry, worker: WorkerState, lease: int, granted_at: float) -> None:
        entry.lease, entry.worker, entry.granted_at = lease, worker.id, granted_at
        worker.leases.add(lease)
        self._leases[lease] = entry

    def _adopt(self, worker: WorkerState, held: Held, now: float) -> None:
        """Take a call over that runs already, unless it is ours or runs elsewhere by now."""
        if held.lease in self._leases:
            self._leases[held.lease].confirmed = True
            return
        known = self._calls.get(held.key)
        epoch = self._epochs.get((held.tenant, held.session_id), held.epoch)
        if (known is not None and known.lease) or held.epoch < epoch:
            self._send(worker.id, Kill(held.key, held.epoch))
            return
        if known is not None:
            self._drop(known)
        want = Want(
            *(held.key, held.tenant, held.session_id, held.epoch, held.tool, held.priority),
            *(0.0, 0, 0.0, 0.0, held.on_crash),
        )
        entry = self._entry("", want, now)
        entry.charged, entry.confirmed = entry.call.cost, True
        self._calls.note(entry)
        self._queue.began(entry.call)
        self._lease(entry, worker, held.lease, now - held.ran_s)
        if known is not None:
            self._grant(known.link, held.key, worker, 0)
            entry.link = known.link

    def _grant(self, link: str, key: str, worker: WorkerState, lease: int) -> None:
        told = self._told[link]
        if worker.id not in told:
            told.add(worker.id)
            self._send(link, worker.peer)
        self._send(link, Granted(key, worker.id, lease))

    def _charge(self, entry: Entry, cost: float) -> None:
        self._queue.charge(entry.call, cost - entry.charged)
        entry.charged = cost

    def _accrue(self, entry: Entry, now: float) -> None:
        cost = (now - entry.granted_at) * entry.estimate.rate
        if cost > entry.charged:
            self._charge(entry, cost)

    def _release(self, entry: Entry, worker: WorkerState, now: float) -> None:
        """A lease is over, and its slot free."""
        worker.leases.discard(entry.lease)
        worker.idle_since = now
        self._queue.ended(entry.call)
        self._calls.strike(entry)
        self._settle_fences()
        if entry.next is not None:
            self._ask(*entry.next, now)

    def _drop(self, entry: Entry) -> None:
        """A call without a lease waits no longer."""
        self._queue.remove(entry.call.key)
        self._calls.strike(entry)

    def _refuse(self, entry: Entry, reason: str) -> None:
        retry_s = 0.0
        if reason == "queue_full":
            place = self._queue.last_place(entry.call, self.roster.slots)
            retry_s = max(_LEAST_RETRY_S, place.wait_s)
        self._drop(entry)
        self._send(entry.link, Refused(entry.want.key, reason, retry_s))

    def _end(self, entry: Entry) -> None:
        """Drop a call that waits, kill one that runs."""
        if not entry.lease:
            self._drop(entry)
            return
        entry.ending = True
        # Its host may not have begun it, and may never.
        self._send(entry.worker, Revoke(entry.lease))
        self._send(entry.worker, Kill(entry.want.key, entry.want.epoch))

    def _end_older(self, session: tuple[str, str], epoch: int) -> set[int]:
        """End the calls of a session's older epochs; return their leases that are still there."""
        if epoch > self._epochs.get(session, -1):
            self._epochs[session] = epoch
            self._epochs.move_to_end(session)
            if len(self._epochs) > _MAX_EPOCHS:
                self._epochs.popitem(last=False)
        ending: set[int] = set()
        for entry in self._calls.of_session(session):
            if entry.want.epoch < epoch:
                if entry.lease:
                    ending.add(entry.lease)
                    self._end(entry)
                else:
                    self._refuse(entry, "refused")
        return ending

    def _settle_fences(self) -> None:
        left = self._leases.keys()
        for fence in [key for key, ending in self._fences.items() if not ending & left]:
            del self._fences[fence]
            self._send(fence[0], Fenced(fence[1]))

    def _bury(self, worker: WorkerState, now: float) -> None:
        self.roster.died(worker)
        self._forget(worker, worker.kept)
        for lease in list(worker.leases):
            entry = self._leases[lease]
            if entry.next is not None:
                link, want = entry.next
                entry.next = link, replace(want, was_at=worker.id)
            self._accrue(entry, now)
            self._release(entry, worker, now)
        for link, told in self._told.items():
            if worker.id in told:
                told.discard(worker.id)
                self._send(link, Gone(worker.id))

    def _keep(self, worker: WorkerState, keys: Iterable[str]) -> None:
        for key in keys:
            self._kept[key] = worker.id
            worker.kept.add(key)

    def _forget(self, worker: WorkerState, keys: Iterable[str]) -> None:
        for key in list(keys):
            worker.kept.discard(key)
            if self._kept.get(key) == worker.id:
                del self._kept[key]

    def _send(self, to: str, message: Message) -> None:
        if to:
            self._out.append(Send(to, message))

    def _flush(self) -> list[Send]:
        out, self._out = self._out, []
        return out
