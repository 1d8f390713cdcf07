"""Gather what is to be sent, and tell each host where a worker is before its first lease there."""

from __future__ import annotations

from collections import defaultdict

import msgspec

from agentray.tools.messages import Gone, Granted, Message
from agentray.tools.roster import WorkerState

__all__ = ["Outbox", "Send"]


class Send(msgspec.Struct, frozen=True):
    """Something to be sent to a host's connection, or to a worker by its id."""

    to: str
    message: Message


class Outbox:
    """What is to be sent, in order."""

    def __init__(self) -> None:
        self._told: defaultdict[str, set[str]] = defaultdict(set)
        self._out: list[Send] = []

    def send(self, to: str, message: Message) -> None:
        """Have something sent; to nobody if ``to`` is empty."""
        if to:
            self._out.append(Send(to, message))

    def grant(self, link: str, key: str, worker: WorkerState, lease: int) -> None:
        """Lead a host to a worker."""
        told = self._told[link]
        if worker.id not in told:
            told.add(worker.id)
            self.send(link, worker.peer)
        self.send(link, Granted(key, worker.id, lease))

    def gone(self, worker: str) -> None:
        """Tell all that know a worker that it is dead."""
        for link, told in self._told.items():
            if worker in told:
                told.discard(worker)
                self.send(link, Gone(worker))

    def left(self, link: str) -> None:
        """A host is gone."""
        self._told.pop(link, None)

    def take(self) -> list[Send]:
        """Return what is to be sent, and begin anew."""
        out, self._out = self._out, []
        return out
