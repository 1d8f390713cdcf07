"""Stand between libpq and its server, and let in no more of an answer than memory is meant for.

libpq takes in whole messages, and reads for as long as there is something to read: what it took
can only be counted afterwards. So its descriptor gets one end of a socket pair in place of the
connection, and the bytes pass from one to the other, counted: those of TLS where there is TLS.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket

__all__ = ["Gate"]

_CHUNK_BYTES = 64 * 1024


class Gate:
    """The gate of one connection. It ends with the connection, or when too much has come.

    To be made when nothing waits for the descriptor, in the loop that uses it.
    """

    def __init__(self, descriptor: int, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._come_bytes = 0
        self.exceeded = False
        self._server = socket.socket(fileno=os.dup(descriptor))
        self._client, given = socket.socketpair()
        for each in (self._server, self._client, given):
            each.setblocking(False)
        with given:
            os.dup2(given.fileno(), descriptor, inheritable=False)
        self.over = asyncio.create_task(self._run(), name="sql-gate")

    def begin(self) -> None:
        """Count from nothing: what is asked next may bring ``most_bytes``."""
        self._come_bytes = 0

    async def close(self) -> None:
        """End it, and with it the connection."""
        self.over.cancel()
        await asyncio.wait([self.over])

    async def _run(self) -> None:
        with self._server, self._client:
            ways = [asyncio.create_task(self._ask()), asyncio.create_task(self._answer())]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.wait(ways)

    async def _ask(self) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while chunk := await loop.sock_recv(self._client, _CHUNK_BYTES):
                await loop.sock_sendall(self._server, chunk)

    async def _answer(self) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while chunk := await loop.sock_recv(self._server, _CHUNK_BYTES):
                self._come_bytes += len(chunk)
                if self._come_bytes > self._most_bytes:
                    self.exceeded = True
                    return
                await loop.sock_sendall(self._client, chunk)
