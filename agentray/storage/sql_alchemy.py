"""Answer statements of models from any other database, through SQLAlchemy and its drivers.

Each call has a connection of its own: there is no way to make a used one as new that all databases
know. SQLite is held to reading by its authorizer; for others only the rights of the user can do
that, so that their configuration has to say `read_only: false`.
"""

from __future__ import annotations

import asyncio
import contextvars
import datetime
import decimal
import sqlite3
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, create_engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from agentray.config.settings import SqlSettings
from agentray.errors import ConfigError, StorageError, StorageUnavailableError
from agentray.storage.sql_base import Column, Table
from agentray.storage.sql_rows import Rows
from agentray.storage.sql_statement import READING, WRITING, admitted
from agentray.telemetry.logging import get_logger

__all__ = ["AlchemyDatabase"]

log = get_logger(__name__)

_PLACEHOLDERS = {"qmark": "?", "format": "%s", "pyformat": "%s", "numeric": ":1"}
_NAMES = {"sqlite": "SQLite", "mysql": "MySQL", "mariadb": "MariaDB", "mssql": "SQL Server"}
_TYPES: tuple[tuple[type, str], ...] = (
    (bool, "boolean"),
    (int, "integer"),
    (float, "real"),
    (decimal.Decimal, "decimal"),
    (datetime.datetime, "timestamp"),
    (datetime.date, "date"),
    (str, "text"),
    (bytes, "bytes"),
)
_MOST_MESSAGE = 2_000
_INTERRUPT_S = 2.0
# One value must not fill a worker's memory.
_MOST_VALUE_BYTES = 16 * 1024 * 1024
_READS = frozenset(
    {
        sqlite3.SQLITE_SELECT,
        sqlite3.SQLITE_READ,
        sqlite3.SQLITE_FUNCTION,
        sqlite3.SQLITE_RECURSIVE,
    }
)
_WRITES = frozenset(
    {
        sqlite3.SQLITE_INSERT,
        sqlite3.SQLITE_UPDATE,
        sqlite3.SQLITE_DELETE,
        sqlite3.SQLITE_TRANSACTION,
    }
)


class AlchemyDatabase:
    """A database by its SQLAlchemy URL, with a driver that is not async: it runs in threads.

    A statement that is cancelled, or takes too long, is interrupted in SQLite. Elsewhere its
    thread goes on until the server ends it, and keeps one of the ``pool_size`` places until then.
    """

    def __init__(self, name: str, settings: SqlSettings) -> None:
        self._name = name
        self._settings = settings
        url = _parsed(name, settings)
        backend = url.get_backend_name()
        self._sqlite = backend == "sqlite"
        if settings.read_only and not self._sqlite:
            raise ConfigError(
                f"tools.sql.{name}: nothing but the user's rights can hold a {backend} database "
                "to reading; give it a user that may only read, and say read_only: false"
            )
        try:
            self._engine = create_engine(url, poolclass=NullPool)
        except (ImportError, NoSuchModuleError) as error:
            raise ConfigError(f"tools.sql.{name}: the driver is missing: {error}") from error
        if self._engine.dialect.is_async:
            raise ConfigError(f"tools.sql.{name}: expected a driver that is not async")
        file = url.database or ""
        made = settings.read_only and not file.startswith((":memory:", "file:"))
        if self._sqlite and made and not Path(file).is_file():
            # SQLite would make an empty one.
            raise ConfigError(f"tools.sql.{name}: there is no file {file!r}")
        self.dialect = _NAMES.get(backend, backend)
        self.placeholder = _PLACEHOLDERS.get(self._engine.dialect.paramstyle, ":1")
        self._keywords = READING if settings.read_only else WRITING
        self._places = asyncio.Semaphore(settings.pool_size)
        # Of its own: statements that hang are to take the place of nothing else in the process.
        self._threads = ThreadPoolExecutor(settings.pool_size, f"sql-{name}")

    async def query(self, statement: str, params: Sequence[Any]) -> Table:
        statement = admitted(statement, self._keywords)
        try:
            async with asyncio.timeout(self._settings.connect_timeout_s):
                await self._places.acquire()
        except TimeoutError as error:
            raise self._unreachable("busy") from error
        call = _Call(self, statement, params)
        run = contextvars.copy_context().run
        thread = asyncio.get_running_loop().run_in_executor(self._threads, run, call.run)
        thread.add_done_callback(self._ended)
        try:
            async with asyncio.timeout(self._settings.statement_timeout_s):
                return await asyncio.shield(thread)
        except TimeoutError as error:
            await self._interrupted(call, thread)
            limit_s = self._settings.statement_timeout_s
            late = f"the statement took longer than {limit_s:g} s"
            raise StorageError(late, reason="timeout") from error
        except asyncio.CancelledError:
            await self._interrupted(call, thread)
            raise

    async def close(self) -> None:
        self._engine.dispose()
        self._threads.shutdown(wait=False)

    def run(self, call: _Call) -> Table:
        """Run a call, in a thread."""
        try:
            connection = self._engine.connect()
        except (SQLAlchemyError, OSError) as error:
            raise self._unreachable(type(error).__name__) from error
        with connection:
            try:
                raw = connection.connection.driver_connection
                if self._sqlite and isinstance(raw, sqlite3.Connection):
                    _contain(raw, writes=not self._settings.read_only)
                call.began(raw)
                table = self._table(connection, call)
                if not self._settings.read_only:
                    connection.commit()
            except DBAPIError as error:
                if error.connection_invalidated:
                    raise self._unreachable("lost") from error
                raise StorageError(str(error.orig)[:_MOST_MESSAGE], reason="error") from error
            except (SQLAlchemyError, sqlite3.Warning, OverflowError, UnicodeError) as error:
                raise StorageError(str(error)[:_MOST_MESSAGE], reason="invalid") from error
            finally:
                call.ended()
        return table

    def _table(self, connection: Connection, call: _Call) -> Table:
        streamed = connection.execution_options(stream_results=True)
        result = streamed.exec_driver_sql(call.statement, tuple(call.params) or None)
        if not result.returns_rows:
            return Table([], [], affected=max(0, result.rowcount))
        row = result.fetchone()
        names = result.keys()
        values = [None] * len(names) if row is None else row
        columns = [Column(name, _type_of(value)) for name, value in zip(names, values, strict=True)]
        rows = Rows(columns, self._settings.max_rows, self._settings.max_bytes)
        # One at a time: a batch of the largest values would fill a worker's memory.
        while row is not None and rows.add(tuple(row)):
            row = result.fetchone()
        return Table(columns, rows.encoded, rows.truncated)

    def _ended(self, thread: asyncio.Future[Table]) -> None:
        self._places.release()
        if not thread.cancelled():
            # Of a call that nobody waits for any more.
            thread.exception()

    async def _interrupted(self, call: _Call, thread: asyncio.Future[Table]) -> None:
        call.interrupt()
        await asyncio.wait([thread], timeout=_INTERRUPT_S)

    def _unreachable(self, what: str) -> StorageUnavailableError:
        # What drivers say may have the address and the user's name in it.
        log.warning("sql_unreachable", database=self._name, error=what)
        message = f"the database {self._name!r} cannot be reached, or was lost on the way"
        return StorageUnavailableError(message, reason="upstream")


class _Call:
    """One statement, with what another thread needs to break it off."""

    def __init__(self, database: AlchemyDatabase, statement: str, params: Sequence[Any]) -> None:
        self._database = database
        self.statement = statement
        self.params = params
        self._lock = threading.Lock()
        self._driver: Any = None
        self._unwanted = False

    def run(self) -> Table:
        return self._database.run(self)

    def began(self, driver: Any) -> None:
        with self._lock:
            if self._unwanted:
                raise StorageError("the call is cancelled", reason="timeout")
            self._driver = driver

    def ended(self) -> None:
        with self._lock:
            self._driver = None

    def interrupt(self) -> None:
        with self._lock:
            self._unwanted = True
            if isinstance(self._driver, sqlite3.Connection):
                self._driver.interrupt()


def _parsed(name: str, settings: SqlSettings) -> URL:
    try:
        url = make_url(settings.url.get_secret_value())
    except ArgumentError:
        # Without its cause: that shows the address.
        raise ConfigError(f"tools.sql.{name}.url: found no database address") from None
    # All drivers of SQLite run it in a thread; this one can be interrupted there.
    return url.set(drivername="sqlite") if url.get_backend_name() == "sqlite" else url


def _contain(connection: sqlite3.Connection, *, writes: bool) -> None:
    allowed = _READS | _WRITES if writes else _READS

    def judge(action: int, _: str | None, second: str | None, *__: str | None) -> int:
        fine = action in allowed and second != "load_extension"
        return sqlite3.SQLITE_OK if fine else sqlite3.SQLITE_DENY

    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MOST_VALUE_BYTES)
    connection.set_authorizer(judge)


def _type_of(value: Any) -> str:
    return next((name for kind, name in _TYPES if isinstance(value, kind)), "")
