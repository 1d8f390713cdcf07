"""The schema of the durable tier, as migrations that run once, in order.

There are no foreign keys: every write of ``turns`` and ``events`` holds the lock of its session's
row already, and a check a row would cost a tenth of an append.
"""

from __future__ import annotations

__all__ = ["MIGRATIONS"]

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE hosts (
        id         text PRIMARY KEY,
        kind       text NOT NULL,
        address    text NOT NULL,
        started_at timestamptz NOT NULL DEFAULT now(),
        beat_at    timestamptz NOT NULL DEFAULT now()
    );

    CREATE TABLE sessions (
        tenant        text NOT NULL,
        id            text NOT NULL,
        agent         text NOT NULL,
        user_id       text,
        placement     text NOT NULL,
        origin        text NOT NULL,
        metadata      json NOT NULL,
        parked_reason text,
        created_at    timestamptz NOT NULL DEFAULT now(),
        updated_at    timestamptz NOT NULL DEFAULT now(),
        expires_at    timestamptz,
        epoch         bigint NOT NULL DEFAULT 0,
        owner         text,
        last_seq      bigint NOT NULL DEFAULT 0,
        inbox         bigint NOT NULL DEFAULT 0,
        turns         bigint NOT NULL DEFAULT 0,
        latest_turn   text,
        PRIMARY KEY (tenant, id)
    ) WITH (fillfactor = 70);
    CREATE INDEX sessions_newest ON sessions (tenant, created_at DESC, id DESC);

    CREATE TABLE turns (
        tenant           text NOT NULL,
        session_id       text NOT NULL,
        id               text NOT NULL,
        ordinal          bigint NOT NULL GENERATED ALWAYS AS IDENTITY,
        state            text NOT NULL,
        status           text,
        idempotency_key  text,
        request_hash     text NOT NULL,
        input            text,
        options          text NOT NULL,
        cancel_requested boolean NOT NULL DEFAULT false,
        accepted_at      timestamptz NOT NULL DEFAULT now(),
        finished_at      timestamptz,
        first_seq        bigint,
        last_seq         bigint,
        PRIMARY KEY (tenant, session_id, id)
    ) WITH (fillfactor = 70);
    CREATE UNIQUE INDEX turns_key ON turns (tenant, session_id, idempotency_key)
        WHERE idempotency_key IS NOT NULL;
    CREATE INDEX turns_open ON turns (tenant, session_id) WHERE state <> 'done';
    CREATE INDEX turns_begun ON turns (tenant, session_id, first_seq)
        WHERE first_seq IS NOT NULL;

    CREATE TABLE events (
        tenant     text NOT NULL,
        session_id text NOT NULL,
        seq        bigint NOT NULL,
        epoch      bigint NOT NULL,
        body       text NOT NULL,
        PRIMARY KEY (tenant, session_id, seq)
    );
    """,
)
