"""Sessions, appends and messages for tests of the durable tier."""

from __future__ import annotations

from typing import Any

from psycopg import AsyncConnection

from agentray.storage.base import (
    Acceptance,
    Accepted,
    Append,
    Claim,
    SessionRow,
    TurnBirth,
)
from agentray.storage.postgres import PostgresStore
from tests.services import until

__all__ = [
    "T",
    "TERM_S",
    "accept",
    "born",
    "claim",
    "create",
    "expire",
    "fall_silent",
    "journal",
    "lines",
    "message",
    "own",
    "put",
    "row_of",
    "session_row",
    "blocked",
]

TERM_S = 3.0
T = "tenant"


def session_row(session_id: str, **changes: Any) -> SessionRow:
    fields: dict[str, Any] = {
        "tenant": T,
        "id": session_id,
        "agent": "assistant",
        "user": None,
        "placement": "shared",
        "origin": "session",
        "metadata": {},
        "parked_reason": None,
        "created_at": 0.0,
        "updated_at": 0.0,
        "expires_at": None,
        "expired": False,
        "epoch": 0,
        "owner": None,
        "owner_alive": False,
        "last_seq": 0,
        "inbox": 0,
        "turns": 0,
        "open_turns": 0,
        "latest_turn": None,
    }
    return SessionRow(**{**fields, **changes})


async def create(store: PostgresStore, *names: str, **changes: Any) -> None:
    ttl_s = changes.pop("ttl_s", None)
    for name in names:
        await store.create_session(session_row(name, **changes), ttl_s=ttl_s)


async def claim(store: PostgresStore, name: str, owner: str, **how: Any) -> Claim | None:
    return await store.claim(T, name, owner, **{"placement": "shared", "term_s": TERM_S, **how})


async def own(store: PostgresStore, name: str, owner: str = "me") -> int:
    """Make a session owned by a living owner; return its epoch."""
    await create(store, name)
    await store.beat(owner, kind="shared", address="here")
    claimed = await claim(store, name, owner)
    assert claimed is not None
    return claimed.row.epoch


def born(turn_id: str, key: str | None = None) -> TurnBirth:
    return TurnBirth(turn_id, key, "hash", b"{}")


def lines(name: str, epoch: int, first_seq: int, count: int = 1, **what: Any) -> Append:
    return Append(
        tenant=T,
        session_id=name,
        epoch=epoch,
        first_seq=first_seq,
        events=tuple(f'{{"n":{first_seq + i}}}'.encode() for i in range(count)),
        **what,
    )


async def put(store: PostgresStore, *appends: Append) -> list[str]:
    return [result.outcome for result in await store.append(appends)]


def message(name: str, turn_id: str, **what: Any) -> Acceptance:
    fields: dict[str, Any] = {
        "tenant": T,
        "session_id": name,
        "turn_id": turn_id,
        "idempotency_key": None,
        "request_hash": "hash",
        "input": b"[]",
        "options": b"{}",
        "if_busy": "enqueue",
        "after_turn": None,
        "max_queued": 100,
    }
    return Acceptance(**{**fields, **what})


async def accept(store: PostgresStore, name: str, turn_id: str, **what: Any) -> Accepted:
    return await store.accept(message(name, turn_id, **what))


async def row_of(store: PostgresStore, name: str) -> SessionRow:
    row = await store.session(T, name)
    assert row is not None
    return row


async def expire(store: PostgresStore, name: str) -> None:
    """Create a session whose time is over."""
    await create(store, name, ttl_s=0.001)

    async def is_over() -> bool:
        return (await row_of(store, name)).expired

    await until(is_over, "the session expires")


async def journal(store: PostgresStore, name: str) -> list[bytes]:
    return await store.events(T, name, after=0, limit=1_000)


async def fall_silent(other: AsyncConnection[Any], owner: str, seconds: float) -> None:
    """Let an owner's last beat lie so long ago; the server itself came up long before that."""
    await other.execute(
        "UPDATE hosts SET beat_at = now() - make_interval(secs => %s) WHERE id = %s",
        [seconds, owner],
    )


async def blocked(other: AsyncConnection[Any], count: int) -> None:
    """Return when so many statements wait for a lock."""

    async def wait() -> bool:
        # Inside of a transaction it would be seen once and remembered.
        await other.execute("SELECT pg_stat_clear_snapshot()")
        cursor = await other.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        )
        return await cursor.fetchone() == (count,)

    await until(wait, f"{count} statements wait for a lock")
