"""A proxy in front of PostgreSQL that cuts connections between a statement and its answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

__all__ = ["PostgresProxy"]

# ReadyForQuery, no transaction under way: what the statement did is committed.
_READY = b"Z\x00\x00\x00\x05I"


class PostgresProxy:
    """Listens on a unix socket and hands everything on to the one of PostgreSQL.

    A connection on which ``marker``, one of ``markers``, was sent is watched: with ``cut`` =
    ``answer``, every second answer that PostgreSQL gives on watched connections is kept and its
    connection closed, the first one included; with ``request``, every second request. So each
    statement is lost once and gets through when it is sent again. ``cuts`` counts them.
    """

    def __init__(self, folder: Path, server_socket: Path, markers: Sequence[bytes]) -> None:
        self.markers = markers
        self._path = folder / ".s.PGSQL.5432"
        self._server_socket = server_socket
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.url = f"postgresql://agentray@/postgres?host={folder}"
        self.marker = b""
        self.cut: Literal["answer", "request"] | None = None
        self.cuts = 0
        self._spare = False

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self._path)

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        from_server, to_server = await asyncio.open_unix_connection(self._server_socket)
        connection = _Connection(self)
        pumps = [
            asyncio.create_task(connection.forward(reader, to_server)),
            asyncio.create_task(connection.back(from_server, writer)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            for end in (writer, to_server):
                end.close()
                with contextlib.suppress(OSError):
                    await end.wait_closed()

    def lose(self, what: Literal["answer", "request"]) -> bool:
        """Return whether this one is to be lost."""
        if self.cut != what:
            return False
        self._spare = not self._spare
        self.cuts += self._spare
        return self._spare


class _Connection:
    def __init__(self, proxy: PostgresProxy) -> None:
        self._proxy = proxy
        self._seen: set[bytes] = set()
        self._asked = False

    async def forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 20):
            # A statement that was prepared goes by a name of its own: its text is seen once.
            self._seen.update(marker for marker in self._proxy.markers if marker in data)
            self._asked = self._proxy.marker in self._seen
            if self._asked and self._proxy.lose("request"):
                return
            writer.write(data)
            await writer.drain()

    async def back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answer = b""
        while data := await reader.read(1 << 20):
            answer += data
            if self._asked and not answer.endswith(_READY):
                continue
            if self._asked and self._proxy.lose("answer"):
                return
            self._asked = False
            writer.write(answer)
            answer = b""
            await writer.drain()
