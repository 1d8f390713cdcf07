"""Answer statements of models from a PostgreSQL database, without trusting them.

What a statement may read or write is for the rights of the database's user to say. Beyond that:
one statement a call, in a transaction that the server holds to reading unless writing is
configured; no more time, rows and bytes than configured; and nothing left for the next call.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import psycopg
from psycopg import AsyncConnection, adapters, sql
from psycopg.adapt import AdaptersMap, Buffer, Loader
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import TransactionStatus
from psycopg.raw_cursor import AsyncRawCursor, AsyncRawServerCursor
from psycopg.rows import tuple_row
from psycopg.types.json import Jsonb
from psycopg.types.string import TextLoader
from psycopg_pool import AsyncConnectionPool, PoolTimeout, TooManyRequests

from agentray.config.settings import SqlSettings
from agentray.errors import StorageError, StorageUnavailableError
from agentray.storage.sql_base import Column, Table, refused
from agentray.storage.sql_gate import Gate
from agentray.storage.sql_rows import Rows
from agentray.storage.sql_statement import READING, WRITING, admitted
from agentray.telemetry.logging import get_logger

__all__ = ["PostgresDatabase"]

log = get_logger(__name__)

# One huge value, an error that quotes one, or a flood of notices must not fill a worker's memory:
# libpq takes in whole messages. What is past this ends the connection.
_MOST_WIRE_BYTES = 16 * 1024 * 1024
_TOO_LARGE = (
    "the result has values or rows that are too large; select less of them, e.g. left(column, 1000)"
)
_BATCH_ROWS = 100
# Longer than the server's own timeout, so that the server's word comes first where it is in force.
_GRACE_S = 0.5
_WAITING_PER_CONNECTION = 16
_MOST_MESSAGE = 2_000
# With one of these, statements that only read could still reach the server's files and programs.
_TOO_STRONG = """
SELECT rolname FROM pg_catalog.pg_roles
WHERE (rolsuper OR rolname IN
    ('pg_execute_server_program', 'pg_read_server_files', 'pg_write_server_files'))
    AND pg_catalog.pg_has_role(session_user, oid, 'MEMBER')
LIMIT 1
"""
_TIME_TYPES = ("date", "time", "timetz", "timestamp", "timestamptz", "interval")
_UNREACHABLE = ("08", "53", "57P", "28", "3D000")
_REFUSED = ("25006", "42501")


class _JsonLoader(Loader):
    """Takes JSON as it is, instead of building Python's objects of it."""

    def load(self, data: Buffer) -> msgspec.Raw:
        return msgspec.Raw(bytes(data))


class _TimeLoader(TextLoader):
    """Takes times as their ISO text: Python's have no infinity and no year 10000."""

    def load(self, data: Buffer) -> str | bytes:
        text = super().load(data)
        return text.replace(" ", "T", 1) if isinstance(text, str) and text[:1].isdigit() else text


class _Context:
    """What psycopg takes loaders from."""

    def __init__(self) -> None:
        self.connection = None
        self.adapters = AdaptersMap(adapters)
        for name in ("json", "jsonb"):
            self.adapters.register_loader(name, _JsonLoader)
        for name in _TIME_TYPES:
            self.adapters.register_loader(name, _TimeLoader)


class _Connection(AsyncConnection[tuple[Any, ...]]):
    """A connection that breaks rather than take in more than it may in one transaction."""

    gate: Gate


class PostgresDatabase:
    """A PostgreSQL database through a pool of connections that each call gets as new.

    ``name`` is what messages call it; nothing of its address is in them.
    """

    dialect = "PostgreSQL"
    placeholder = "$1"

    def __init__(self, name: str, settings: SqlSettings) -> None:
        self._name = name
        self._settings = settings
        self._keywords = READING if settings.read_only else WRITING
        self._pool: AsyncConnectionPool[_Connection] = AsyncConnectionPool(
            settings.url.get_secret_value(),
            kwargs=_connect_arguments(settings),
            connection_class=_Connection,
            min_size=0,
            max_size=settings.pool_size,
            max_waiting=settings.pool_size * _WAITING_PER_CONNECTION,
            timeout=settings.connect_timeout_s,
            reconnect_timeout=0,
            configure=self._guard,
            check=AsyncConnectionPool.check_connection,
            reset=_reset,
            open=False,
        )
        self._gates: set[Gate] = set()
        self._opening = asyncio.Lock()
        self._checked = False

    async def query(self, statement: str, params: Sequence[Any]) -> Table:
        statement = admitted(statement, self._keywords)
        arguments = [_argument(value) for value in params]
        async with self._translated(), self._connection() as connection:
            async with asyncio.timeout(self._settings.statement_timeout_s + _GRACE_S):
                return await self._run(connection, statement, arguments)

    async def close(self) -> None:
        await self._pool.close()
        await asyncio.gather(*(gate.close() for gate in self._gates))

    async def _guard(self, connection: _Connection) -> None:
        gate = connection.gate = Gate(connection.pgconn.socket, _MOST_WIRE_BYTES)
        self._gates.add(gate)
        gate.over.add_done_callback(lambda _: self._gates.discard(gate))

    @asynccontextmanager
    async def _connection(self) -> AsyncGenerator[_Connection]:
        async with self._opening:
            await self._pool.open()
        async with self._pool.connection() as connection:
            if not self._checked:
                await self._check_user(connection)
                self._checked = True
            connection.gate.begin()
            try:
                yield connection
            except psycopg.Error as error:
                if connection.gate.exceeded:
                    raise StorageError(_TOO_LARGE, reason="output") from error
                raise
            finally:
                await _end_transaction(connection)

    async def _check_user(self, connection: _Connection) -> None:
        cursor = await connection.execute(_TOO_STRONG)
        if (role := await cursor.fetchone()) is not None:
            log.error("sql_user_too_strong", database=self._name, role=role[0])
            raise refused(
                f"the database {self._name!r} is configured with a user that has the rights of "
                f"{role[0]}; it needs one with rights of its own, that may read what agents may"
            )

    async def _run(self, connection: _Connection, statement: str, params: Sequence[Any]) -> Table:
        if self._settings.read_only:
            return await self._read(connection, statement, params, mode="READ ONLY")
        try:
            table = await self._read(connection, statement, params, mode="READ WRITE")
        except (psycopg.errors.SyntaxError, psycopg.errors.FeatureNotSupported):
            # A cursor is for queries alone. What it could not be declared for has not run.
            await connection.rollback()
            table = await self._write(connection, statement, params)
        await connection.execute("COMMIT")
        return table

    async def _begin(self, connection: _Connection, mode: str) -> None:
        await connection.execute(f"BEGIN {mode}".encode())
        if self._settings.role:
            role = sql.Identifier(self._settings.role)
            await connection.execute(sql.SQL("SET LOCAL ROLE {}").format(role))
        # Behind a transaction's first query, the server does not let it turn to writing.
        await connection.execute("SELECT 1")

    async def _read(
        self, connection: _Connection, statement: str, params: Sequence[Any], *, mode: str
    ) -> Table:
        """Answer from a cursor on the server, which it opens for a single query and nothing
        else, and which sends no more than is fetched."""
        await self._begin(connection, mode)
        cursor = AsyncRawServerCursor(connection, "agentray", row_factory=tuple_row)
        async with cursor:
            await cursor.execute(statement.encode(), params)
            if not cursor.description:
                raise refused("the statement has no columns")
            rows = self._rows(cursor)
            while True:
                batch = rows.next_batch(_BATCH_ROWS)
                fetched = await cursor.fetchmany(batch)
                if not all(map(rows.add, fetched)) or len(fetched) < batch:
                    break
            return Table(_columns(cursor), rows.encoded, rows.truncated)

    async def _write(self, connection: _Connection, statement: str, params: Sequence[Any]) -> Table:
        await self._begin(connection, "READ WRITE")
        cursor = AsyncRawCursor(connection, row_factory=tuple_row)
        async with cursor:
            # A pipeline speaks the extended protocol, whose statements are single ones.
            async with connection.pipeline():
                await cursor.execute(statement.encode(), params)
            if not cursor.description:
                return Table([], [], affected=max(0, cursor.rowcount))
            rows = self._rows(cursor)
            for row in await cursor.fetchall():
                if not rows.add(row):
                    break
            return Table(_columns(cursor), rows.encoded, rows.truncated, cursor.rowcount)

    def _rows(self, cursor: psycopg.AsyncCursor[Any]) -> Rows:
        return Rows(_columns(cursor), self._settings.max_rows, self._settings.max_bytes)

    @asynccontextmanager
    async def _translated(self) -> AsyncGenerator[None]:
        try:
            yield
        except TimeoutError as error:
            raise self._late() from error
        except psycopg.Error as error:
            raise self._failed(error) from error
        except UnicodeEncodeError as error:
            raise refused("the statement, or a parameter, is no valid Unicode") from error

    def _failed(self, error: psycopg.Error) -> StorageError:
        state = error.diag.sqlstate or error.sqlstate or ""
        if isinstance(error, PoolTimeout | TooManyRequests) or state.startswith(_UNREACHABLE):
            return self._unreachable(state)
        if isinstance(error, psycopg.errors.QueryCanceled):
            return self._late()
        if not state and isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
            return self._unreachable(state)
        said = error.diag.message_primary or str(error)
        hint = f"; {error.diag.message_hint}" if error.diag.message_hint else ""
        reason = "refused" if state in _REFUSED else "error" if state else "invalid"
        return StorageError(f"{said}{hint}"[:_MOST_MESSAGE], reason=reason, sqlstate=state)

    def _late(self) -> StorageError:
        limit_s = self._settings.statement_timeout_s
        return StorageError(f"the statement took longer than {limit_s:g} s", reason="timeout")

    def _unreachable(self, state: str) -> StorageUnavailableError:
        # What libpq says has the address and the user's name in it.
        log.warning("sql_unreachable", database=self._name, sqlstate=state)
        what = f"the database {self._name!r} cannot be reached, or was lost on the way"
        return StorageUnavailableError(what, reason="upstream", sqlstate=state)


def _connect_arguments(settings: SqlSettings) -> dict[str, Any]:
    milliseconds = int(settings.statement_timeout_s * 1000)
    options = {
        "statement_timeout": milliseconds,
        "idle_in_transaction_session_timeout": milliseconds * 2,
        "lock_timeout": milliseconds,
        # A worker that was killed leaves no statement running.
        "client_connection_check_interval": 1_000,
        "default_transaction_read_only": "on" if settings.read_only else "off",
        "client_min_messages": "error",
        "datestyle": "ISO",
        "intervalstyle": "iso_8601",
        "timezone": "UTC",
    }
    # As options of the connection they are what RESET ALL goes back to.
    ours = " ".join(f"-c {name}={value}" for name, value in options.items())
    given = conninfo_to_dict(settings.url.get_secret_value()).get("options") or ""
    return {
        "autocommit": True,
        "options": f"{given} {ours}".strip(),
        "application_name": "agentray-sql",
        "connect_timeout": max(1, int(settings.connect_timeout_s)),
        # What is prepared would be gone behind DISCARD ALL.
        "prepare_threshold": None,
        "row_factory": tuple_row,
        "context": _Context(),
    }


async def _reset(connection: _Connection) -> None:
    """Take from a connection what a call left: settings, role, locks, temporary tables."""
    await connection.execute("DISCARD ALL")


async def _end_transaction(connection: _Connection) -> None:
    status = connection.pgconn.transaction_status
    if status in (TransactionStatus.ACTIVE, TransactionStatus.UNKNOWN):
        # Broken off amid an answer, or lost: there is no way on but another connection.
        await connection.close()
    elif status != TransactionStatus.IDLE:
        await connection.rollback()


def _argument(value: Any) -> Any:
    return Jsonb(value) if isinstance(value, dict) else value


def _columns(cursor: psycopg.AsyncCursor[Any]) -> list[Column]:
    return [Column(column.name, column.type_display) for column in cursor.description or ()]
