"""Files and batches on PostgreSQL, over few connections that sessions never wait for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal

import msgspec
from psycopg import AsyncConnection

from agentray.config.settings import PostgresSettings
from agentray.errors import StorageUnavailableError
from agentray.storage import postgres_batches_sql as sql
from agentray.storage.batches import (
    BatchFault,
    BatchRow,
    ClaimedLine,
    EndStatus,
    FileRow,
    LineUsage,
    NewLine,
)
from agentray.storage.postgres_pool import new_pool, run, translated

__all__ = ["DOOR_CONNECTIONS", "PIECE_BYTES", "RUNNER_CONNECTIONS", "PostgresBatches"]

PIECE_BYTES = 256 * 1024
"""About how large the pieces are that files are stored in."""

DOOR_CONNECTIONS = 3
"""Connections of one host to PostgreSQL for what its clients ask of files and batches."""

RUNNER_CONNECTIONS = 2
"""And those for running batches, which no upload may hold up."""

# Of a transaction that moves a whole file.
_LONG_S = 600.0


class PostgresBatches:
    """``FileStore``, ``BatchBook`` and ``BatchWork``. It connects when it is first used, at most
    ``connections`` times; one of them is never held by moving a file."""

    def __init__(
        self, url: str, settings: PostgresSettings, connections: int = DOOR_CONNECTIONS
    ) -> None:
        self._settings = settings
        self._pool = new_pool(url, settings, connections, least=0)
        self._files = asyncio.Semaphore(connections - 1)

    async def close(self) -> None:
        """Close all connections."""
        await self._pool.close(timeout=2.0)

    async def _rows(
        self, statement: str, params: Sequence[Any] | dict[str, Any]
    ) -> list[dict[str, Any]]:
        await self._connect()
        timeout_s = self._settings.statement_timeout_s
        return await run(self._pool, statement, params, timeout_s=timeout_s)

    async def _connect(self) -> None:
        if self._pool.closed:
            async with translated():
                await self._pool.open(wait=False)

    @asynccontextmanager
    async def _transaction(self) -> AsyncGenerator[AsyncConnection[dict[str, Any]]]:
        await self._connect()
        async with (
            translated(),
            asyncio.timeout(_LONG_S),
            self._files,
            self._pool.connection() as connection,
            connection.transaction(),
        ):
            timeout = f"SET LOCAL statement_timeout = {int(_LONG_S * 1000)}"
            await connection.execute(timeout.encode())
            yield connection

    # Files

    async def create_file(
        self,
        tenant: str,
        file_id: str,
        pieces: AsyncIterable[bytes],
        *,
        purpose: Literal["batch", "batch_output"],
        filename: str,
        ttl_s: float | None,
    ) -> FileRow:
        number = size = 0
        async with self._transaction() as connection:
            async for piece in pieces:
                await connection.execute(sql.CREATE_PIECE, [tenant, file_id, number, piece])
                number += 1
                size += len(piece)
            row = [tenant, file_id, purpose, filename, size, ttl_s]
            await connection.execute(sql.CREATE_FILE, row)
        made = await self.file(tenant, file_id)
        if made is None:
            raise StorageUnavailableError(f"file {file_id} was deleted while it was made")
        return made

    async def file(self, tenant: str, file_id: str) -> FileRow | None:
        rows = await self._rows(f"{sql.FILE} AND id = %(id)s", {"tenant": tenant, "id": file_id})
        return FileRow(**rows[0]) if rows else None

    async def files(
        self,
        tenant: str,
        *,
        purpose: str | None,
        after: str | None,
        limit: int,
        newest_first: bool,
    ) -> list[FileRow]:
        params = {"tenant": tenant, "purpose": purpose, "after": after, "limit": limit}
        rows = await self._rows(sql.list_files(newest_first=newest_first), params)
        return [FileRow(**row) for row in rows]

    async def read_piece(self, tenant: str, file_id: str, number: int) -> bytes | None:
        rows = await self._rows(
            "SELECT body FROM file_pieces WHERE tenant = %s AND file_id = %s AND number = %s",
            [tenant, file_id, number],
        )
        return rows[0]["body"] if rows else None

    async def delete_file(self, tenant: str, file_id: str) -> bool:
        return bool(await self._rows(sql.DELETE_FILE, [tenant, file_id]))

    async def delete_expired_files(self) -> int:
        return len(await self._rows(sql.DELETE_EXPIRED_FILES, []))

    # Batches, for those who order them

    async def create_batch(
        self,
        tenant: str,
        batch_id: str,
        *,
        input_file_id: str,
        endpoint: str,
        metadata: dict[str, str] | None,
        window_s: float,
        output_ttl_s: float,
    ) -> BatchRow:
        facts = None if metadata is None else _json(metadata)
        row = [tenant, batch_id, input_file_id, endpoint, facts, window_s, output_ttl_s]
        await self._rows(sql.CREATE_BATCH, row)
        made = await self.batch(tenant, batch_id)
        assert made is not None  # nothing deletes a batch
        return made

    async def batch(self, tenant: str, batch_id: str) -> BatchRow | None:
        rows = await self._rows(
            f"{sql.BATCH} WHERE b.tenant = %s AND b.id = %s", [tenant, batch_id]
        )
        return _batch(rows[0]) if rows else None

    async def batches(self, tenant: str, *, after: str | None, limit: int) -> list[BatchRow]:
        rows = await self._rows(
            f"{sql.BATCH} WHERE b.tenant = %s AND (%s::text IS NULL OR b.id < %s)"
            " ORDER BY b.id DESC LIMIT %s",
            [tenant, after, after, limit],
        )
        return [_batch(row) for row in rows]

    async def cancel_batch(self, tenant: str, batch_id: str) -> BatchRow | None:
        await self._rows(sql.CANCEL, [tenant, batch_id])
        return await self.batch(tenant, batch_id)

    # Batches, for those who run them

    async def open_batches(self, limit: int, *, resting: Sequence[str] = ()) -> list[BatchRow]:
        rows = await self._rows(sql.OPEN, {"limit": limit, "resting": list(resting)})
        return [_batch(row) for row in rows]

    async def claim_batch(self, tenant: str, batch_id: str, by: str, *, lease_s: float) -> bool:
        return bool(await self._rows(sql.CLAIM_BATCH, [by, lease_s, tenant, batch_id]))

    async def add_lines(
        self, tenant: str, batch_id: str, by: str, lines: Sequence[NewLine], *, lease_s: float
    ) -> bool:
        params = {
            "tenant": tenant,
            "batch": batch_id,
            "by": by,
            "lease_s": lease_s,
            "numbers": [line.number for line in lines],
            "heads": [line.head for line in lines],
            "bodies": [line.body for line in lines],
        }
        return bool(await self._rows(sql.ADD_LINES, params))

    async def begin_batch(self, tenant: str, batch_id: str, by: str, *, total: int) -> bool:
        return bool(await self._rows(sql.BEGIN, [total, tenant, batch_id, by]))

    async def fail_batch(
        self, tenant: str, batch_id: str, by: str, faults: Sequence[BatchFault]
    ) -> bool:
        return bool(await self._rows(sql.FAIL, [_json(faults), tenant, batch_id, by]))

    async def claim_lines(
        self, tenant: str, batch_id: str, by: str, *, limit: int, lease_s: float
    ) -> list[ClaimedLine]:
        params = {
            "tenant": tenant,
            "batch": batch_id,
            "by": by,
            "limit": limit,
            "lease_s": lease_s,
        }
        rows = await self._rows(sql.CLAIM_LINES, params)
        lines = [ClaimedLine(**row) for row in rows]
        return sorted(lines, key=lambda line: line.number)

    async def renew_lines(self, by: str, lines: Sequence[ClaimedLine], *, lease_s: float) -> None:
        params = {
            "by": by,
            "lease_s": lease_s,
            "tenants": [line.tenant for line in lines],
            "batches": [line.batch_id for line in lines],
            "numbers": [line.number for line in lines],
        }
        await self._rows(sql.RENEW, params)

    async def give_back(self, by: str) -> None:
        for statement in sql.GIVE_BACK:
            await self._rows(statement, [by])

    async def put_off(
        self, line: ClaimedLine, by: str, delay_s: float, *, counts: bool = True
    ) -> None:
        which = [line.tenant, line.batch_id, line.number, by]
        await self._rows(sql.PUT_OFF, [0 if counts else 1, delay_s, *which])

    async def record(
        self, line: ClaimedLine, *, succeeded: bool, result: bytes, usage: LineUsage
    ) -> bool:
        params = {
            "tenant": line.tenant,
            "batch": line.batch_id,
            "number": line.number,
            "succeeded": succeeded,
            "result": result,
            **msgspec.to_builtins(usage),
        }
        return bool(await self._rows(sql.RECORD, params))

    async def finalize_batch(self, tenant: str, batch_id: str) -> None:
        await self._rows(sql.FINALIZE, [tenant, batch_id])

    async def finish_batch(
        self,
        tenant: str,
        batch_id: str,
        status: EndStatus,
        *,
        unfinished: bytes,
        output_file_id: str,
        error_file_id: str,
    ) -> bool:
        async with self._transaction() as connection:
            lock = sql.LOCK_ENDING.format(before=sql.BEFORE_END[status])
            cursor = await connection.execute(lock.encode(), [tenant, batch_id])
            row = await cursor.fetchone()
            if row is None:
                return False
            # A statement of its own: it sees the claims for which the lock above waited.
            cursor = await connection.execute(sql.STILL_RUNNING, [tenant, batch_id])
            if await cursor.fetchone() is not None:
                return False
            output: str | None = None
            errors: str | None = None
            rest = 0
            if row["ran"]:
                cursor = await connection.execute(sql.FAIL_REST, [unfinished, tenant, batch_id])
                rest = cursor.rowcount
                of_batch = {"tenant": tenant, "batch": batch_id, "piece_bytes": PIECE_BYTES}
                output = await _write(connection, of_batch, output_file_id, succeeded=True)
                errors = await _write(connection, of_batch, error_file_id, succeeded=False)
            await connection.execute(
                "DELETE FROM batch_lines WHERE tenant = %s AND batch_id = %s", [tenant, batch_id]
            )
            end = sql.END.format(status=status)
            params = [status, rest, output, errors, tenant, batch_id]
            await connection.execute(end.encode(), params)
        return True


async def _write(
    connection: AsyncConnection[dict[str, Any]],
    of_batch: dict[str, Any],
    file_id: str,
    *,
    succeeded: bool,
) -> str | None:
    """Write one of a batch's files; return its id, or None if it has no lines."""
    kind = "output" if succeeded else "error"
    facts = {
        "file": file_id,
        "succeeded": succeeded,
        "filename": f"{of_batch['batch']}_{kind}.jsonl",
    }
    cursor = await connection.execute(sql.WRITE_FILE, {**of_batch, **facts})
    row = await cursor.fetchone()
    return None if row is None else row["id"]


def _batch(row: dict[str, Any]) -> BatchRow:
    return msgspec.convert(row, BatchRow)


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
