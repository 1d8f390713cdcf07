"""Know the workers of the pool: which are there, what they hold, which one takes a call. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from agentray.tools.messages import Peer, Register

__all__ = ["Roster", "WorkerState"]

# A connection that broke comes back within this, or its worker is dead.
LOST_S = 4.0
# A worker that beats no more hangs.
SILENT_S = 15.0
_MAX_DEAD = 1_000


class WorkerState:
    """A worker: its leases, the calls whose results it keeps, and when it was last heard."""

    __slots__ = (
        *("id", "name", "peer", "slots", "leases", "kept"),
        *("connected", "draining", "seen_at", "lost_at", "idle_since"),
    )

    def __init__(self, register: Register, now: float) -> None:
        self.id = register.worker
        self.name = register.name
        self.leases: set[int] = set()
        self.kept: set[str] = set()
        self.draining = False
        self.idle_since = now
        self.back(register, now)

    def back(self, register: Register, now: float) -> None:
        """It is connected, for the first time or again."""
        self.peer = Peer(register.worker, register.host, register.port, register.token)
        self.slots = register.slots
        self.connected = True
        self.seen_at = now
        self.lost_at = 0.0

    @property
    def free(self) -> int:
        return self.slots - len(self.leases) if self.connected and not self.draining else 0


class Roster:
    """The workers by id. ``expected`` are the names of actors that were there when the scheduler
    began: until they have told what they run, or ``settle_s`` is over, it is not known."""

    def __init__(self, expected: Iterable[str], now: float, *, settle_s: float) -> None:
        self.workers: dict[str, WorkerState] = {}
        self._expected = set(expected)
        self._settles_at = now + settle_s
        self._dead: OrderedDict[str, None] = OrderedDict()
        self._kept: dict[str, WorkerState] = {}

    def settled(self, now: float) -> bool:
        """Whether it is known what runs at the workers that were there before."""
        if self._expected and now >= self._settles_at:
            self._expected.clear()
        return not self._expected

    def is_dead(self, worker: str) -> bool:
        """Whether a worker was taken for dead; what it still runs counts no more."""
        return worker in self._dead

    def register(self, register: Register, now: float) -> list[WorkerState]:
        """Take a worker in; return those that are dead because it came in their place."""
        self._expected.discard(register.name)
        worker = self.workers.get(register.worker)
        if worker is not None:
            worker.back(register, now)
            return []
        # Ray starts an actor's process anew when the one before is gone.
        before = [old for old in self.workers.values() if old.name == register.name]
        self.workers[register.worker] = WorkerState(register, now)
        return before

    def died(self, worker: WorkerState) -> None:
        """Strike a worker off, and the results that it kept."""
        self.forget(worker, worker.kept)
        del self.workers[worker.id]
        self._dead[worker.id] = None
        if len(self._dead) > _MAX_DEAD:
            self._dead.popitem(last=False)

    def keep(self, worker: WorkerState, keys: Iterable[str]) -> None:
        """A worker keeps the results of these calls."""
        for key in keys:
            self._kept[key] = worker
            worker.kept.add(key)

    def forget(self, worker: WorkerState, keys: Iterable[str]) -> None:
        """A worker keeps these results no longer."""
        for key in list(keys):
            worker.kept.discard(key)
            if self._kept.get(key) is worker:
                del self._kept[key]

    def keeper(self, key: str) -> WorkerState | None:
        """Return the worker that keeps the result of a call."""
        return self._kept.get(key)

    def lost(self, worker: WorkerState, now: float) -> None:
        """A worker's connection broke."""
        worker.connected = False
        worker.lost_at = now

    def given_up(self, now: float) -> list[WorkerState]:
        """Return those that were lost and did not come back in time."""
        every = self.workers.values()
        return [w for w in every if not w.connected and now - w.lost_at >= LOST_S]

    def silent(self, now: float) -> list[WorkerState]:
        """Return those that are connected and say nothing."""
        every = self.workers.values()
        return [w for w in every if w.connected and now - w.seen_at >= SILENT_S]

    def choose(self) -> WorkerState | None:
        """Return the one with the most free slots, or None if there is none."""
        best: WorkerState | None = None
        most = 0
        for worker in self.workers.values():
            if worker.free > most:
                best, most = worker, worker.free
        return best

    @property
    def slots(self) -> int:
        """The slots of all that take calls."""
        return sum(w.slots for w in self.workers.values() if w.connected and not w.draining)
