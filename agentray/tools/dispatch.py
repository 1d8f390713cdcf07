"""Carry out what the leases decide: the scheduler without its process."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from agentray.clock import Clock
from agentray.telemetry.logging import get_logger
from agentray.tools.leases import Leases
from agentray.tools.messages import (
    Alive,
    Fence,
    Finished,
    Forgot,
    Hello,
    Left,
    Register,
    Revoked,
    Want,
)
from agentray.tools.outbox import Send
from agentray.tools.wire import Link, connect, listen

__all__ = ["Dispatch"]

log = get_logger(__name__)

_SWEEP_S = 0.1
_STATE_EVERY = 10
_PLACES_EVERY = 20
_PROBE_S = 1.0
_PROBE_PAUSE_S = 0.2


class Dispatch:
    """Listens to hosts and workers: ``start``, then ``run`` until cancelled."""

    def __init__(self, leases: Leases, host: str, token: str, clock: Clock) -> None:
        self.leases = leases
        self._host = host
        self._token = token
        self._clock = clock
        self._numbers = itertools.count(1)
        self._links: dict[str, Link] = {}
        self._names: dict[Link, str] = {}
        self._workers: set[str] = set()
        self._server: asyncio.Server | None = None
        self._probes: set[asyncio.Task[None]] = set()
        self.port = 0
        self._on: dict[type, Callable[[str, Any, float], Sequence[Send]]] = {
            Want: leases.want,
            Left: leases.left,
            Fence: leases.fence,
            Finished: leases.finished,
            Alive: lambda name, message, now: leases.alive(name, message.leases, now),
            Revoked: lambda name, message, now: leases.revoked(message.lease, now),
        }

    async def start(self) -> None:
        """Listen."""
        self._server, self.port = await listen(self, self._host, self._token)

    async def run(self) -> None:
        """Do what time does."""
        for turn in itertools.count(1):
            await asyncio.sleep(_SWEEP_S)
            self._send(self.leases.sweep(self._clock.monotonic()))
            if turn % _PLACES_EVERY == 0:
                self._send(self.leases.places())
            if turn % _STATE_EVERY == 0:
                state = self.leases.state()
                for link in self._links.values():
                    # To workers too, as a sign of life.
                    link.send(state)

    def opened(self, link: Link, hello: Hello) -> None:
        # Until it registers, it may be a host.
        self._name(link, f"host-{next(self._numbers)}")

    def received(self, link: Link, message: object) -> None:
        name, now = self._names[link], self._clock.monotonic()
        handle = self._on.get(type(message))
        if handle is not None:
            self._send(handle(name, message, now))
        elif isinstance(message, Register):
            self._register(link, message, now)
        elif isinstance(message, Forgot):
            self.leases.forgot(name, message.keys)
        else:
            log.warning("tool_message_unexpected", kind=type(message).__name__)

    def closed(self, link: Link) -> None:
        name = self._names.pop(link, None)
        if name is None or self._links.get(name) is not link:
            # A probe, or one that another connection of the same worker took the place of.
            return
        del self._links[name]
        now = self._clock.monotonic()
        if name in self._workers:
            self._workers.discard(name)
            self.leases.worker_lost(name, now)
            probe = asyncio.get_running_loop().create_task(self._probe(name))
            self._probes.add(probe)
            probe.add_done_callback(self._probes.discard)
        else:
            self._send(self.leases.host_left(name, now))

    def _name(self, link: Link, name: str) -> None:
        if (old := self._names.get(link)) is not None:
            del self._links[old]
        self._names[link] = name
        self._links[name] = link

    def _register(self, link: Link, register: Register, now: float) -> None:
        if (before := self._links.get(register.worker)) is not None and before is not link:
            before.abort()
        self._name(link, register.worker)
        self._workers.add(register.worker)
        log.info("tool_worker_registered", worker=register.worker, slots=register.slots)
        self._send(self.leases.registered(register, now))

    async def _probe(self, worker: str) -> None:
        """Find out whether a worker whose connection broke is dead: then nobody listens there."""
        while (found := self.leases.roster.workers.get(worker)) and not found.connected:
            peer = found.peer
            try:
                link = await connect(
                    *(self, peer.host, peer.port),
                    token="",
                    name="scheduler",
                    timeout_s=_PROBE_S,
                )
                link.abort()
            except ConnectionRefusedError:
                log.warning("tool_worker_died", worker=worker)
                self._send(self.leases.worker_died(worker, self._clock.monotonic()))
                return
            except OSError:
                pass
            await asyncio.sleep(_PROBE_PAUSE_S)

    def _send(self, sends: Sequence[Send]) -> None:
        for send in sends:
            if (link := self._links.get(send.to)) is not None:
                link.send(send.message)
