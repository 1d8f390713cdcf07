"""Keep a host's connections to workers, and know which calls are behind each."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from agentray.telemetry.logging import get_logger
from agentray.tools.asked_call import AskedCall
from agentray.tools.messages import Peer
from agentray.tools.wire import Link, Listener, connect

__all__ = ["Door", "Doors"]

log = get_logger(__name__)

_CONNECT_S = 5.0


class Door:
    """A worker, the connection to it while there is one, and the calls that wait behind it."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.link: Link | None = None
        self.lock = asyncio.Lock()
        self.calls: set[AskedCall] = set()


class Doors:
    """Those of one host, which calls itself ``name``; ``listener`` hears what comes through."""

    def __init__(self, listener: Listener, name: str) -> None:
        self._listener = listener
        self._name = name
        self._by_worker: dict[str, Door] = {}
        self._by_link: dict[Link, Door] = {}

    def get(self, worker: str) -> Door | None:
        return self._by_worker.get(worker)

    def links(self) -> Iterator[Link]:
        """Return the connections that there are."""
        return iter(list(self._by_link))

    def add(self, peer: Peer) -> None:
        """A worker is there."""
        self._by_worker.setdefault(peer.worker, Door(peer))

    def gone(self, worker: str) -> None:
        """A worker is dead: its calls are told as when the connection breaks."""
        door = self._by_worker.pop(worker, None)
        if door is not None and door.link is not None:
            door.link.abort()

    async def enter(self, door: Door) -> Link | None:
        """Return the connection to a worker, or None if it cannot be reached."""
        async with door.lock:
            if door.link is None:
                peer = door.peer
                try:
                    link = await connect(
                        *(self._listener, peer.host, peer.port),
                        token=peer.token,
                        name=self._name,
                        timeout_s=_CONNECT_S,
                    )
                except OSError as error:
                    log.warning("tool_worker_unreachable", worker=peer.worker, error=str(error))
                    return None
                door.link = link
                self._by_link[link] = door
            return door.link

    def closed(self, link: Link) -> list[AskedCall]:
        """A connection broke; return the calls that waited behind it."""
        door = self._by_link.pop(link, None)
        if door is None:
            return []
        door.link = None
        return list(door.calls)
