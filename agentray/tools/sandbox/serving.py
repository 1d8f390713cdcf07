"""Serve, for one run at a time, the listener that a slot's programs find on their loopback."""

from __future__ import annotations

import asyncio
import contextlib
import socket

from agentray.tools.sandbox.base import Serve

__all__ = ["begin", "end"]

_GONE_S = 5.0


def begin(listener: socket.socket, network: Serve | None) -> asyncio.Task[None]:
    """Begin to serve a run; without a network, whoever connects is turned away."""
    listener.setblocking(False)
    # What the run before it had not been accepted of would count as this one's.
    with contextlib.suppress(OSError):
        while True:
            listener.accept()[0].close()
    return asyncio.create_task((network or _turn_away)(listener))


async def end(serving: asyncio.Task[None]) -> None:
    """End all connections of a run."""
    serving.cancel()
    await asyncio.wait([serving], timeout=_GONE_S)


async def _turn_away(listener: socket.socket) -> None:
    while True:
        with contextlib.suppress(ConnectionError):
            connection, _ = await asyncio.get_running_loop().sock_accept(listener)
            connection.close()
