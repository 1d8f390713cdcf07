"""The connection on which an owner's journal is written: one statement, one batch at a time.

A cursor of psycopg's converts parameters, looks for a prepared statement and keeps results for
whoever may read them in another way: a third of what a small append cost in this process. Here
the statement is prepared once, its two parameters are the bytes that they are, and of its rows
there is one way to read them. It is psycopg's own interface to libpq, without a cursor.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import msgspec
import psycopg
from psycopg import AsyncConnection
from psycopg.pq import ExecStatus
from psycopg.pq.abc import PGresult
from psycopg.waiting import Ready, Wait

from agentray.storage.base import Append, AppendResult

__all__ = ["AppendConnection"]

_NAME = b"append"
_PREPARE = b"PREPARE append (json, text) AS SELECT * FROM append_events($1, $2)"
_encode = msgspec.json.Encoder().encode


class AppendConnection:
    """Sends batches of appends; whoever uses it sends one at a time.

    After an error or a cancellation, ``close`` it: its answer may still be on the way.
    """

    def __init__(self, connection: AsyncConnection[Any]) -> None:
        self._connection = connection

    @classmethod
    async def open(cls, url: str, **options: Any) -> AppendConnection:
        """Connect. Raises ``psycopg.Error``."""
        connection = await AsyncConnection.connect(url, **options)
        try:
            await connection.execute(_PREPARE)
        except BaseException:
            await connection.close()
            raise
        return cls(connection)

    @property
    def closed(self) -> bool:
        return self._connection.closed

    async def close(self) -> None:
        await self._connection.close()

    async def append(self, appends: Sequence[Append]) -> list[AppendResult]:
        """Append, and return what became of each, in their order. Raises ``psycopg.Error``."""
        result = await self._connection.wait(self._run(_parameters(appends)))
        return [_outcome(result, row) for row in range(result.ntuples)]

    def _run(self, parameters: Sequence[bytes]) -> Generator[Wait, Ready | int, PGresult]:
        server = self._connection.pgconn
        server.send_query_prepared(_NAME, parameters)
        while server.flush():
            if (yield Wait.RW) & Ready.R:
                server.consume_input()
        while server.is_busy():
            yield Wait.R
            server.consume_input()
        result = server.get_result()
        while (more := server.get_result()) is not None:
            result = more
        if result is None or result.status != ExecStatus.TUPLES_OK:
            raise _error(result)
        return result


def _error(result: PGresult | None) -> psycopg.Error:
    if result is None:
        return psycopg.OperationalError("the connection was closed")
    state = result.error_field(psycopg.pq.DiagnosticField.SQLSTATE)
    message = result.error_message.decode(errors="replace").strip()
    if not state:
        return psycopg.OperationalError(message)
    try:
        return psycopg.errors.lookup(state.decode())(message)
    except KeyError:
        return psycopg.DatabaseError(message)


def _outcome(result: PGresult, row: int) -> AppendResult:
    outcome, epoch, last_seq = (result.get_value(row, column) or b"" for column in range(3))
    return AppendResult(outcome.decode(), int(epoch), int(last_seq))  # type: ignore[arg-type]


class _Head(msgspec.Struct, omit_defaults=True):
    """An append without its events, as ``append_events`` takes it."""

    tenant: str
    id: str
    epoch: int
    first_seq: int
    n: int
    inbox: int | None = None
    born: str | None = None
    key: str | None = None
    hash: str | None = None
    options: str | None = None
    started: str | None = None
    ended: str | None = None
    status: str | None = None
    cost: float = 0.0


def _head(append: Append) -> _Head:
    head = _Head(
        append.tenant,
        append.session_id,
        append.epoch,
        append.first_seq,
        len(append.events),
        inbox=append.inbox,
        started=append.started_turn,
        ended=append.ended_turn,
        status=append.ended_status,
        cost=append.cost,
    )
    if (born := append.born) is not None:
        head.born, head.key, head.hash = born.turn_id, born.idempotency_key, born.request_hash
        head.options = born.options.decode()
    return head


def _parameters(appends: Sequence[Append]) -> tuple[bytes, bytes]:
    # No newline is left in JSON that msgspec has encoded.
    bodies = b"\n".join([event for append in appends for event in append.events])
    return _encode([_head(append) for append in appends]), bodies
