"""The durable tier on PostgreSQL: fenced appends, acceptance, ownership and heartbeats."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal
from weakref import WeakValueDictionary

import msgspec
import psycopg
from psycopg import AsyncConnection

from agentray.config.settings import PostgresSettings
from agentray.errors import StorageError, StorageUnavailableError
from agentray.storage import postgres_sql as sql
from agentray.storage.base import (
    Acceptance,
    Accepted,
    Append,
    AppendResult,
    Claim,
    OpenTurn,
    SessionRow,
    TurnRow,
)
from agentray.storage.postgres_append import AppendConnection
from agentray.storage.postgres_pool import Pool, connect_arguments, new_pool, run, translated
from agentray.storage.postgres_scratch import PostgresScratch
from agentray.storage.schema import MIGRATIONS

__all__ = ["PostgresStore", "forget_hosts", "migrate"]

_MIGRATION_LOCK = 0x61_67_72_61_79


async def migrate(url: str, *, timeout_s: float = 10.0) -> None:
    """Bring the schema up to date; safe with many processes starting together.

    Raises:
        StorageUnavailableError: the server cannot be reached.
        StorageError: the schema is newer than this program, or a statement was refused.
    """
    async with translated():
        connection = await AsyncConnection.connect(
            url, autocommit=True, connect_timeout=max(1, int(timeout_s))
        )
        async with connection:
            await connection.execute("SELECT pg_advisory_lock(%s)", [_MIGRATION_LOCK])
            await connection.execute(
                "CREATE TABLE IF NOT EXISTS schema_version (version int NOT NULL)"
            )
            cursor = await connection.execute(
                "SELECT coalesce(max(version), 0) FROM schema_version"
            )
            row = await cursor.fetchone()
            version: int = row[0] if row else 0
            if version > len(MIGRATIONS):
                raise StorageError(
                    f"the database has schema version {version}, this program knows "
                    f"{len(MIGRATIONS)}: install a newer agentray"
                )
            for number, statements in enumerate(MIGRATIONS[version:], start=version + 1):
                async with connection.transaction():
                    await connection.execute(statements.encode())
                    await connection.execute("INSERT INTO schema_version VALUES (%s)", [number])


async def forget_hosts(url: str) -> None:
    """Declare every owner dead. Only for whoever knows that none is left alive.

    Raises:
        StorageUnavailableError: the server cannot be reached.
    """
    async with translated(), await AsyncConnection.connect(url, autocommit=True) as connection:
        await connection.execute("DELETE FROM hosts")


class PostgresStore:
    """``DurableStore`` on a PostgreSQL server.

    Appends have a connection of their own, and so have heartbeats: nothing that callers ask for
    queues in front of them, or a busy owner would pass for dead. The rest shares a pool.
    Statements that wait for a session's row do so one at a time: a row that somebody holds keeps
    one connection busy, not all.
    """

    def __init__(self, url: str, settings: PostgresSettings, *, term_s: float) -> None:
        self._url = url
        self._settings = settings
        self._term_s = term_s
        self._journal: AppendConnection | None = None
        self._waits: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()
        self._pool = new_pool(url, settings, settings.pool_size)
        self._life = new_pool(url, settings, 1)
        self.scratch = PostgresScratch(self._pool, settings)

    async def open(self) -> None:
        """Connect. Raises ``StorageUnavailableError``."""
        async with translated():
            await self._pool.open(wait=False)
            await self._life.open(wait=False)
        await self.ping()

    async def close(self) -> None:
        await self._pool.close(timeout=2.0)
        await self._life.close(timeout=2.0)
        if self._journal is not None:
            await self._journal.close()

    async def ping(self) -> None:
        await self._rows("SELECT 1", [])

    async def _rows(
        self, statement: str, params: Sequence[Any], pool: Pool | None = None
    ) -> list[dict[str, Any]]:
        timeout_s = self._settings.statement_timeout_s
        return await run(pool or self._pool, statement, params, timeout_s=timeout_s)

    @asynccontextmanager
    async def _waiting(self, tenant: str, session_id: str) -> AsyncGenerator[None]:
        """Let one statement at a time wait for a session's row."""
        lock = self._waits.setdefault((tenant, session_id), asyncio.Lock())
        async with translated(), asyncio.timeout(self._settings.statement_timeout_s), lock:
            yield

    # The journal

    async def append(self, appends: Sequence[Append]) -> list[AppendResult]:
        settings = self._settings
        timeout_s = settings.connect_timeout_s + settings.statement_timeout_s
        async with translated(), asyncio.timeout(timeout_s):
            try:
                if self._journal is None or self._journal.closed:
                    self._journal = await AppendConnection.open(
                        self._url, **connect_arguments(settings)
                    )
                return await self._journal.append(appends)
            except (psycopg.OperationalError, psycopg.InterfaceError, asyncio.CancelledError):
                # The answer may have been lost: never read it for another statement.
                if self._journal is not None:
                    connection, self._journal = self._journal, None
                    await connection.close()
                raise

    async def events(
        self, tenant: str, session_id: str, *, after: int, limit: int, up_to: int | None = None
    ) -> list[bytes]:
        rows = await self._rows(
            "SELECT body FROM events WHERE tenant = %s AND session_id = %s AND seq > %s"
            " AND seq <= %s ORDER BY seq LIMIT %s",
            [tenant, session_id, after, up_to if up_to is not None else 2**62, limit],
        )
        return [row["body"].encode() for row in rows]

    async def recent_events(self, tenant: str, session_id: str, *, turns: int) -> list[bytes]:
        rows = await self._rows(
            sql.RECENT_EVENTS, [tenant, session_id, tenant, session_id, max(0, turns - 1)]
        )
        return [row["body"].encode() for row in rows]

    # Sessions

    async def create_session(
        self, row: SessionRow, *, ttl_s: float | None, owner: str | None = None
    ) -> tuple[SessionRow, bool]:
        rows = await self._rows(
            sql.CREATE_SESSION,
            [
                row.tenant,
                row.id,
                row.agent,
                row.user,
                row.placement,
                row.origin,
                msgspec.json.encode(row.metadata).decode(),
                ttl_s,
                owner,
            ],
        )
        existing = await self.session(row.tenant, row.id)
        if existing is None:
            raise StorageUnavailableError(f"session {row.id} was deleted while it was made")
        return existing, bool(rows)

    async def session(self, tenant: str, session_id: str) -> SessionRow | None:
        rows = await self._rows(sql.SESSION, [self._term_s, tenant, session_id])
        return _session_row(rows[0]) if rows else None

    async def sessions(
        self,
        tenant: str,
        *,
        user: str | None,
        agent: str | None,
        status: str | None,
        before: tuple[float, str] | None,
        limit: int,
    ) -> list[SessionRow]:
        statement, params = sql.list_sessions(
            self._term_s, tenant, user=user, agent=agent, status=status, before=before, limit=limit
        )
        return [_session_row(row) for row in await self._rows(statement, params)]

    async def update_metadata(
        self, tenant: str, session_id: str, metadata: dict[str, str]
    ) -> SessionRow | None:
        async with self._waiting(tenant, session_id):
            await self._rows(
                "UPDATE sessions SET metadata = %s, updated_at = now()"
                " WHERE tenant = %s AND id = %s",
                [msgspec.json.encode(metadata).decode(), tenant, session_id],
            )
        return await self.session(tenant, session_id)

    async def delete_session(self, tenant: str, session_id: str) -> SessionRow | None:
        async with (
            self._waiting(tenant, session_id),
            self._pool.connection() as connection,
            connection.transaction(),
        ):
            cursor = await connection.execute(
                sql.SESSION + " FOR UPDATE OF s", [self._term_s, tenant, session_id]
            )
            row = await cursor.fetchone()
            if row is None:
                return None
            for statement in sql.DELETE_SESSION:
                await connection.execute(statement, [tenant, session_id])
            return _session_row(row)

    async def fork_session(
        self, tenant: str, session_id: str, new_id: str, up_to_seq: int
    ) -> SessionRow | None:
        async with (
            self._waiting(tenant, session_id),
            self._pool.connection() as connection,
            connection.transaction(),
        ):
            names = {"tenant": tenant, "old": session_id, "new": new_id, "seq": up_to_seq}
            for statement in sql.FORK_SESSION:
                cursor = await connection.execute(statement, names)
                if not cursor.rowcount:
                    break  # there is no such session, or the new one exists already
        return await self.session(tenant, new_id)

    # Turns

    async def accept(self, acceptance: Acceptance) -> Accepted:
        a = acceptance
        facts: list[Any] = [a.input.decode(), a.options.decode(), a.if_busy, a.after_turn]
        facts += [a.max_queued, self._term_s]
        async with self._waiting(a.tenant, a.session_id):
            [row] = await self._rows(
                sql.ACCEPT,
                [a.tenant, a.session_id, a.turn_id, a.idempotency_key, a.request_hash, *facts],
            )
        turn: TurnRow | None = None
        if row["outcome"] == "accepted":
            turn = TurnRow(
                id=a.turn_id,
                ordinal=row["turn_ordinal"],
                state="accepted",
                status=None,
                idempotency_key=a.idempotency_key,
                request_hash=a.request_hash,
                input=a.input,
                options=a.options,
                cancel_requested=False,
                accepted_at=row["turn_at"],
                finished_at=None,
                first_seq=None,
                last_seq=None,
            )
        elif row["outcome"] == "duplicate":
            turn = await self.turn(a.tenant, a.session_id, a.turn_id)
            if turn is None and a.idempotency_key is not None:
                turn = await self.turn_by_key(a.tenant, a.session_id, a.idempotency_key)
        return Accepted(
            outcome=row["outcome"] if turn or row["outcome"] != "duplicate" else "gone",
            owner=row["at_owner"],
            owner_alive=bool(row["at_owner_alive"]),
            placement=row["at_placement"] or "shared",
            last_seq=row["at_seq"] or 0,
            epoch=row["at_epoch"] or 0,
            inbox=row["at_inbox"] or 0,
            turn=turn,
        )

    async def turn(self, tenant: str, session_id: str, turn_id: str) -> TurnRow | None:
        rows = await self._rows(sql.TURN + " AND id = %s", [tenant, session_id, turn_id])
        return _turn_row(rows[0]) if rows else None

    async def turn_by_key(self, tenant: str, session_id: str, key: str) -> TurnRow | None:
        rows = await self._rows(sql.TURN + " AND idempotency_key = %s", [tenant, session_id, key])
        return _turn_row(rows[0]) if rows else None

    async def request_cancel(
        self, tenant: str, session_id: str, turn_id: str | None
    ) -> tuple[list[str], str | None]:
        async with self._waiting(tenant, session_id):
            rows = await self._rows(sql.REQUEST_CANCEL, [tenant, session_id, turn_id, turn_id])
        return [row["id"] for row in rows], rows[0]["owner"] if rows else None

    # Ownership

    async def claim(
        self,
        tenant: str,
        session_id: str,
        owner: str,
        *,
        placement: Literal["shared", "dedicated"],
        term_s: float,
    ) -> Claim | None:
        async with self._waiting(tenant, session_id):
            rows = await self._rows(
                sql.CLAIM, [owner, tenant, session_id, placement, owner, term_s]
            )
        if not rows:
            return None
        previous: str | None = rows[0].pop("previous_owner")
        row = _session_row(rows[0])
        turns = await self._rows(
            sql.TURN + " AND state <> 'done' ORDER BY ordinal", [tenant, session_id]
        )
        return Claim(
            row=row,
            turns=tuple(_turn_row(turn) for turn in turns),
            previous_owner=previous,
        )

    async def release(
        self, tenant: str, session_id: str, *, epoch: int, inbox: int
    ) -> Literal["released", "inbox", "lost"]:
        # The inbox is a column of the locked row, because a subquery over turns would be
        # answered from the statement's snapshot, taken before it waited for that lock.
        async with self._waiting(tenant, session_id):
            rows = await self._rows(
                "UPDATE sessions SET owner = NULL WHERE tenant = %s AND id = %s AND epoch = %s"
                " AND inbox = %s RETURNING 1 AS one",
                [tenant, session_id, epoch, inbox],
            )
        if rows:
            return "released"
        current = await self.session(tenant, session_id)
        return "inbox" if current is not None and current.epoch == epoch else "lost"

    async def park(self, tenant: str, session_id: str, *, epoch: int, reason: str) -> None:
        async with self._waiting(tenant, session_id):
            await self._rows(
                "UPDATE sessions SET owner = NULL, parked_reason = %s, updated_at = now()"
                " WHERE tenant = %s AND id = %s AND epoch = %s",
                [reason, tenant, session_id, epoch],
            )

    async def open_turns(
        self, tenant: str, session_id: str, *, epoch: int
    ) -> tuple[int, tuple[TurnRow, ...]] | None:
        # The count is read first: a turn that comes in between is seen twice, never missed.
        row = await self.session(tenant, session_id)
        if row is None or row.epoch != epoch:
            return None
        turns = await self._rows(
            sql.TURN + " AND state <> 'done' ORDER BY ordinal", [tenant, session_id]
        )
        return row.inbox, tuple(_turn_row(turn) for turn in turns)

    async def inbox(self, owner: str) -> list[OpenTurn]:
        rows = await self._rows(sql.INBOX, [owner])
        return [
            OpenTurn(r["tenant"], r["session_id"], r["id"], r["state"], r["cancel_requested"])
            for r in rows
        ]

    async def orphans(
        self, *, term_s: float, limit: int
    ) -> list[tuple[str, str, Literal["shared", "dedicated"]]]:
        rows = await self._rows(sql.ORPHANS, [term_s, limit])
        return [(row["tenant"], row["id"], row["placement"]) for row in rows]

    async def epochs(self, sessions: Sequence[tuple[str, str]]) -> dict[tuple[str, str], int]:
        rows = await self._rows(
            "SELECT s.tenant, s.id, s.epoch FROM sessions s JOIN unnest(%s::text[], %s::text[])"
            " AS w(tenant, id) ON s.tenant = w.tenant AND s.id = w.id",
            [[tenant for tenant, _ in sessions], [session_id for _, session_id in sessions]],
            self._life,
        )
        return {(row["tenant"], row["id"]): row["epoch"] for row in rows}

    async def beat(self, owner: str, *, kind: str, address: str) -> None:
        await self._rows(
            "INSERT INTO hosts (id, kind, address) VALUES (%s, %s, %s)"
            " ON CONFLICT (id) DO UPDATE SET beat_at = now(), address = excluded.address",
            [owner, kind, address],
            self._life,
        )

    async def forget_owner(self, owner: str) -> None:
        await self._rows("DELETE FROM hosts WHERE id = %s", [owner])


def _session_row(row: dict[str, Any]) -> SessionRow:
    return SessionRow(**row)


def _turn_row(row: dict[str, Any]) -> TurnRow:
    body: str | None = row["input"]
    row["input"] = body.encode() if body is not None else None
    row["options"] = row["options"].encode()
    return TurnRow(**row)
