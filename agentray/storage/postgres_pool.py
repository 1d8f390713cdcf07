"""A pool of connections to PostgreSQL whose failures are ours."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import psycopg
from psycopg import AsyncConnection
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from agentray.config.settings import PostgresSettings
from agentray.errors import StorageError, StorageUnavailableError

__all__ = ["Pool", "connect_arguments", "new_pool", "run", "translated"]

Pool = AsyncConnectionPool[AsyncConnection[dict[str, Any]]]


@asynccontextmanager
async def translated() -> AsyncGenerator[None]:
    """Turn what psycopg raises within the context into errors of storage."""
    try:
        yield
    except (psycopg.OperationalError, psycopg.InterfaceError, PoolTimeout) as error:
        said = str(error).strip() or type(error).__name__
        raise StorageUnavailableError(f"PostgreSQL: {said}") from error
    except TimeoutError as error:
        raise StorageUnavailableError("PostgreSQL did not answer in time") from error
    except psycopg.Error as error:
        raise StorageError(f"PostgreSQL refused a statement: {error}") from error


def connect_arguments(settings: PostgresSettings) -> dict[str, Any]:
    """Return how each connection is opened."""
    return {
        "autocommit": True,
        "options": f"-c statement_timeout={int(settings.statement_timeout_s * 1000)}",
        "connect_timeout": max(1, int(settings.connect_timeout_s)),
        "prepare_threshold": 2,
    }


def new_pool(url: str, settings: PostgresSettings, size: int, *, least: int = 1) -> Pool:
    """Return a pool, not opened yet, of ``least`` to ``size`` connections."""
    return AsyncConnectionPool(
        url,
        kwargs={**connect_arguments(settings), "row_factory": dict_row},
        connection_class=AsyncConnection[dict[str, Any]],
        min_size=least,
        max_size=size,
        timeout=settings.connect_timeout_s,
        reconnect_timeout=0,
        check=None,
        open=False,
    )


async def run(
    pool: Pool, statement: str, params: Sequence[Any] | dict[str, Any], *, timeout_s: float
) -> list[dict[str, Any]]:
    """Run one statement and return its rows, if it has any.

    Raises:
        StorageUnavailableError: the server cannot be reached, or did not answer in time.
        StorageError: it refused the statement.
    """
    async with translated(), asyncio.timeout(timeout_s):
        try:
            async with pool.connection() as connection:
                cursor = await connection.execute(statement.encode(), params)
                return await cursor.fetchall() if cursor.description else []
        except psycopg.OperationalError:
            # A server that restarted leaves dead connections in the pool: weed them out.
            await pool.check()
            raise
