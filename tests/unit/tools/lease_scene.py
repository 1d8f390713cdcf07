"""A scheduler's brain with workers and hosts that are played by hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from agentray.tools.cost import Estimates, SlotShare
from agentray.tools.fair_queue import FairQueue, Share
from agentray.tools.leases import Leases
from agentray.tools.messages import (
    Fence,
    Finished,
    Granted,
    Held,
    Left,
    Message,
    Register,
    Want,
)
from agentray.tools.outbox import Send
from agentray.tools.roster import Roster

__all__ = ["Scene", "key_of"]

SLOT = SlotShare(cpu=0.5, memory_bytes=100.0)

M = TypeVar("M", bound=Message)


def key_of(key: str, tenant: str = "acme", session: str = "s") -> str:
    return f"{tenant}\0{session}\0{key}"


class Scene:
    """``expected`` are the workers that were there before this scheduler."""

    def __init__(
        self,
        *,
        expected: Iterable[str] = (),
        share: Share | None = None,
        max_queued: int = 1_000,
        first_lease: int = 1,
    ) -> None:
        self.now = 100.0
        self.roster = Roster(expected, self.now, settle_s=8.0)
        queue = FairQueue(lambda _: share or Share(), max_queued=max_queued)
        self.leases = Leases(queue, Estimates(SLOT), SLOT, self.roster, first_lease)
        self.sent: list[Send] = []
        """All that was sent since the last ``said``."""

    # What happens

    def worker(
        self,
        worker: str,
        *,
        name: str = "",
        slots: int = 1,
        held: Sequence[Held] = (),
        kept: Iterable[str] = (),
    ) -> None:
        register = Register(
            worker, name or worker, "127.0.0.1", 1, "token", slots, [*held], [*kept]
        )
        self._note(self.leases.registered(register, self.now))

    def want(self, key: str, *, link: str = "host", epoch: int = 1, **given: Any) -> None:
        tenant, session = given.pop("tenant", "acme"), given.pop("session", "s")
        fields: dict[str, Any] = {
            "tool": "wait",
            "priority": "interactive",
            "cpu": 0.0,
            "memory_bytes": 0,
            "timeout_s": 60.0,
            "left_s": 0.0,
            "on_crash": "report",
            **given,
        }
        want = Want(key_of(key, tenant, session), tenant, session, epoch, **fields)
        self._note(self.leases.want(link, want, self.now))

    def left(self, key: str, *, link: str = "host", epoch: int = 1) -> None:
        self._note(self.leases.left(link, Left(key_of(key), epoch), self.now))

    def fence(self, epoch: int, *, link: str = "host", number: int = 1, session: str = "s") -> None:
        self._note(self.leases.fence(link, Fence(number, "acme", session, epoch), self.now))

    def alive(self, worker: str, *leases: int) -> None:
        self._note(self.leases.alive(worker, leases, self.now))

    def finished(
        self,
        worker: str,
        lease: int,
        key: str,
        *,
        wall_s: float = 1.0,
        cpu_s: float = 0.0,
        memory_bytes: int = 0,
        killed: bool = False,
    ) -> None:
        used = (wall_s, cpu_s, memory_bytes)
        done = Finished(lease, key_of(key), *used, killed, kept=not killed)
        self._note(self.leases.finished(worker, done, self.now))

    def revoked(self, lease: int) -> None:
        self._note(self.leases.revoked(lease, self.now))

    def lost(self, worker: str) -> None:
        self.leases.worker_lost(worker, self.now)

    def died(self, worker: str) -> None:
        self._note(self.leases.worker_died(worker, self.now))

    def host_left(self, link: str = "host") -> None:
        self._note(self.leases.host_left(link, self.now))

    def after(self, seconds: float) -> None:
        """Let time pass, as the scheduler does."""
        self.now += seconds
        self._note(self.leases.sweep(self.now))

    # What is said

    def said(self, kind: type[M], to: str = "host") -> list[M]:
        """Return the messages of a kind that somebody was sent since they were asked for last."""
        found = [
            send.message for send in self.sent if send.to == to and isinstance(send.message, kind)
        ]
        self.sent = [
            send for send in self.sent if send.to != to or not isinstance(send.message, kind)
        ]
        return found

    def granted(self, key: str, *, to: str = "host") -> Granted:
        """Return the one lease that a host was given for a call, and for no other."""
        (only,) = self.said(Granted, to)
        assert only.key == key_of(key)
        return only

    def nothing_said(self, kind: type[Message], to: str = "host") -> bool:
        return not self.said(kind, to)

    @staticmethod
    def held(key: str, lease: int, *, epoch: int = 1, ran_s: float = 1.0, **given: Any) -> Held:
        """Return a call that a worker says it runs."""
        tenant, session = given.get("tenant", "acme"), given.get("session", "s")
        return Held(
            *(lease, key_of(key, tenant, session), tenant, session, epoch, "wait", "interactive"),
            *(given.get("on_crash", "report"), ran_s, given.get("killed", False)),
        )

    def _note(self, sends: Iterable[Send]) -> None:
        self.sent += sends
