"""Offer configured databases as tools: one statement a call, its result as a typed table."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from typing import Any, cast

import msgspec

from agentray.config.settings import SqlSettings
from agentray.errors import StorageError, ToolError
from agentray.storage.sql_base import Database, Table
from agentray.tools.spec import ToolContext, ToolSpec

__all__ = ["SqlTools", "open_database"]

_MOST_PARAMS = 200
_UNFIT = re.compile(r"[^a-zA-Z0-9_-]")
_encode = msgspec.json.Encoder().encode


def open_database(name: str, settings: SqlSettings) -> Database:
    """Return a database, not connected yet: PostgreSQL's own client for its addresses, and
    SQLAlchemy for all others.

    Raises:
        ConfigError: SQLAlchemy or a driver is missing, or the database cannot be held to reading.
    """
    if settings.url.get_secret_value().startswith(("postgresql://", "postgres://")):
        from agentray.storage.sql_postgres import PostgresDatabase

        return PostgresDatabase(name, settings)
    from agentray.storage.sql_alchemy import AlchemyDatabase

    return AlchemyDatabase(name, settings)


class SqlTools:
    """A tool for each configured database, named ``sql_<name>``.

    Databases are connected to by the first call. ``open_`` makes them, for tests.
    """

    def __init__(
        self,
        settings: Mapping[str, SqlSettings],
        *,
        open_: Callable[[str, SqlSettings], Database] = open_database,
    ) -> None:
        self._databases = {name: open_(name, section) for name, section in settings.items()}
        self._settings = dict(settings)

    def specs(self) -> list[ToolSpec]:
        """Return the tools."""
        return [self._spec(name) for name in self._databases]

    async def close(self) -> None:
        """Close all connections."""
        await asyncio.gather(*(database.close() for database in self._databases.values()))

    def _spec(self, name: str) -> ToolSpec:
        settings, database = self._settings[name], self._databases[name]

        async def run(arguments: dict[str, Any], context: ToolContext) -> str:
            return await _answer(database, arguments)

        return ToolSpec(
            name="sql_" + _UNFIT.sub("_", name),
            description=_description(name, settings, database),
            parameters=_parameters(database.placeholder),
            run=run,
            # What reads can be read again; whether a lost write took place nobody knows.
            on_crash="retry" if settings.read_only else "report",
            timeout_s=settings.connect_timeout_s + settings.statement_timeout_s + 5.0,
            cpu=0.1,
        )


def _description(name: str, settings: SqlSettings, database: Database) -> str:
    may = "read" if settings.read_only else "read and change"
    said = f" {settings.description.strip()}" if settings.description.strip() else ""
    return (
        f"Runs one {database.dialect} statement on the database {name!r}, which it may {may}.{said}"
        f" Answers with columns and at most {settings.max_rows} rows as JSON; `truncated` says "
        "that there were more."
    )


def _parameters(placeholder: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "statement": {"type": "string", "description": "A single SQL statement."},
            "params": {
                "type": "array",
                "description": f"Values of its parameters, the first of which is {placeholder}.",
                "items": {},
                "maxItems": _MOST_PARAMS,
            },
        },
        "required": ["statement"],
        "additionalProperties": False,
    }


async def _answer(database: Database, arguments: dict[str, Any]) -> str:
    statement, params = arguments.get("statement"), arguments.get("params")
    if not isinstance(statement, str) or not isinstance(params, list | None):
        raise ToolError("expected `statement` as text and `params` as a list", reason="invalid")
    values = cast("list[Any]", params or [])
    if len(values) > _MOST_PARAMS:
        raise ToolError(f"at most {_MOST_PARAMS} params are taken", reason="invalid")
    try:
        table = await database.query(statement, values)
    except StorageError as error:
        state = error.fields.get("sqlstate")
        said = f"{error.message} (SQLSTATE {state})" if state else error.message
        raise ToolError(said, reason=error.fields.get("reason", "error")) from error
    return _shown(table)


def _shown(table: Table) -> str:
    found: dict[str, Any] = {
        "columns": table.columns,
        "rows": table.rows,
        "row_count": len(table.rows),
        "truncated": table.truncated,
    }
    if table.affected is not None:
        found["affected"] = table.affected
    return _encode(found).decode()
