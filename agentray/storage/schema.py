"""The schema of the durable tier, as migrations that run once, in order.

Until the first release there is one, which is changed in place: a database of an earlier commit has
to be made anew. From then on each change is a migration of its own.

There are no foreign keys: every write of ``turns`` and ``events`` holds the lock of its session's
row already, and a check a row would cost a tenth of an append. Keys are compared as bytes: they are
ASCII, and the rules of a language would cost more than the rest of a look into an index.
"""

from __future__ import annotations

__all__ = ["MIGRATIONS"]

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE hosts (
        id         text COLLATE "C" PRIMARY KEY,
        kind       text NOT NULL,
        address    text NOT NULL,
        started_at timestamptz NOT NULL DEFAULT now(),
        beat_at    timestamptz NOT NULL DEFAULT now()
    );

    CREATE TABLE sessions (
        tenant        text COLLATE "C" NOT NULL,
        id            text COLLATE "C" NOT NULL,
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
        cost          float8 NOT NULL DEFAULT 0,
        latest_turn   text,
        PRIMARY KEY (tenant, id)
    ) WITH (fillfactor = 70);
    -- Without the id, ties are sorted behind it: with it, lookups by id were planned as scans of
    -- this index as long as the table had no statistics.
    CREATE INDEX sessions_newest ON sessions (tenant, created_at DESC);
    CREATE INDEX sessions_of_user ON sessions (tenant, user_id, created_at DESC)
        WHERE user_id IS NOT NULL;

    CREATE TABLE turns (
        tenant           text COLLATE "C" NOT NULL,
        session_id       text COLLATE "C" NOT NULL,
        id               text COLLATE "C" NOT NULL,
        ordinal          bigint NOT NULL GENERATED ALWAYS AS IDENTITY,
        state            text NOT NULL,
        status           text,
        idempotency_key  text COLLATE "C",
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
        tenant     text COLLATE "C" NOT NULL,
        session_id text COLLATE "C" NOT NULL,
        seq        bigint NOT NULL,
        epoch      bigint NOT NULL,
        body       text NOT NULL,
        PRIMARY KEY (tenant, session_id, seq)
    );

    -- Files that a session's tools left, as one tar, by the seq of the call that left them.
    CREATE TABLE scratch (
        tenant     text COLLATE "C" NOT NULL,
        session_id text COLLATE "C" NOT NULL,
        seq        bigint NOT NULL,
        body       bytea NOT NULL,
        PRIMARY KEY (tenant, session_id, seq)
    );

    -- Of files, in pieces: a value of PostgreSQL is in memory whole. Ids are in order of age.
    CREATE TABLE files (
        tenant     text COLLATE "C" NOT NULL,
        id         text COLLATE "C" NOT NULL,
        purpose    text NOT NULL,
        filename   text NOT NULL,
        size_bytes bigint NOT NULL,
        created_at timestamptz NOT NULL DEFAULT now(),
        expires_at timestamptz,
        PRIMARY KEY (tenant, id)
    );
    CREATE INDEX files_expiring ON files (expires_at) WHERE expires_at IS NOT NULL;

    CREATE TABLE file_pieces (
        tenant  text COLLATE "C" NOT NULL,
        file_id text COLLATE "C" NOT NULL,
        number  int NOT NULL,
        body    bytea NOT NULL,
        PRIMARY KEY (tenant, file_id, number)
    );

    CREATE TABLE batches (
        tenant           text COLLATE "C" NOT NULL,
        id               text COLLATE "C" NOT NULL,
        input_file_id    text NOT NULL,
        endpoint         text NOT NULL,
        metadata         json,
        status           text NOT NULL DEFAULT 'validating',
        errors           json,
        created_at       timestamptz NOT NULL DEFAULT now(),
        expires_at       timestamptz NOT NULL,
        in_progress_at   timestamptz,
        finalizing_at    timestamptz,
        completed_at     timestamptz,
        failed_at        timestamptz,
        expired_at       timestamptz,
        cancelling_at    timestamptz,
        cancelled_at     timestamptz,
        total            bigint NOT NULL DEFAULT 0,
        completed        bigint NOT NULL DEFAULT 0,
        failed           bigint NOT NULL DEFAULT 0,
        input_tokens     bigint NOT NULL DEFAULT 0,
        cached_tokens    bigint NOT NULL DEFAULT 0,
        output_tokens    bigint NOT NULL DEFAULT 0,
        reasoning_tokens bigint NOT NULL DEFAULT 0,
        output_file_id   text,
        error_file_id    text,
        output_ttl_s     float8 NOT NULL,
        claimed_by       text COLLATE "C",
        leased_until     timestamptz,
        PRIMARY KEY (tenant, id)
    ) WITH (fillfactor = 50);
    CREATE INDEX batches_open ON batches (created_at)
        WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling');

    -- A line runs while it is claimed and not due, waits while it is neither, and may be taken
    -- when it is due. Its line of a file is head and result.
    CREATE TABLE batch_lines (
        tenant     text COLLATE "C" NOT NULL,
        batch_id   text COLLATE "C" NOT NULL,
        number     int NOT NULL,
        head       bytea NOT NULL,
        body       bytea,
        due_at     timestamptz NOT NULL DEFAULT now(),
        claimed_by text COLLATE "C",
        attempts   int NOT NULL DEFAULT 0,
        succeeded  boolean,
        result     bytea,
        PRIMARY KEY (tenant, batch_id, number)
    );
    CREATE INDEX batch_lines_due ON batch_lines (tenant, batch_id, due_at, number)
        WHERE result IS NULL;
    CREATE INDEX batch_lines_claimed ON batch_lines (claimed_by, tenant, batch_id)
        WHERE claimed_by IS NOT NULL;

    -- Accept a turn for whoever owns the session, in one round trip. Each statement of a volatile
    -- function has a snapshot of its own: what follows the row's lock sees what came before it.
    CREATE FUNCTION accept_turn(
        of_tenant text, of_session text, new_turn text, new_key text, new_hash text,
        new_input text, new_options text, if_busy text, after_turn text, max_queued int,
        term_s float8,
        OUT outcome text, OUT at_owner text, OUT at_owner_alive boolean, OUT at_placement text,
        OUT at_seq bigint, OUT at_epoch bigint, OUT at_inbox bigint,
        OUT turn_ordinal bigint, OUT turn_at float8
    ) LANGUAGE plpgsql VOLATILE AS $accept$
    DECLARE
        s sessions%ROWTYPE;
        waiting bigint;
    BEGIN
        SELECT * INTO s FROM sessions WHERE tenant = of_tenant AND id = of_session FOR UPDATE;
        IF NOT FOUND THEN
            outcome := 'gone';
            RETURN;
        END IF;
        at_owner := s.owner;
        at_placement := s.placement;
        at_seq := s.last_seq;
        at_epoch := s.epoch;
        at_inbox := s.inbox;
        at_owner_alive := EXISTS (
            SELECT 1 FROM hosts h WHERE h.id = s.owner AND greatest(
                h.beat_at, pg_postmaster_start_time()) > now() - make_interval(secs => term_s));
        IF EXISTS (
            SELECT 1 FROM turns t WHERE t.tenant = of_tenant AND t.session_id = of_session
            AND t.id = new_turn
        ) OR new_key IS NOT NULL AND EXISTS (
            SELECT 1 FROM turns t WHERE t.tenant = of_tenant AND t.session_id = of_session
            AND t.idempotency_key = new_key
        ) THEN
            outcome := 'duplicate';
            RETURN;
        END IF;
        SELECT count(*) INTO waiting FROM turns t
        WHERE t.tenant = of_tenant AND t.session_id = of_session AND t.state <> 'done';
        outcome := CASE
            WHEN s.expires_at <= now() THEN 'closed'
            WHEN if_busy = 'reject' AND waiting > 0 THEN 'busy'
            WHEN after_turn IS NOT NULL AND s.latest_turn IS DISTINCT FROM after_turn
                THEN 'outdated'
            WHEN waiting >= max_queued THEN 'full'
            ELSE 'accepted'
        END;
        IF outcome <> 'accepted' THEN
            RETURN;
        END IF;
        IF if_busy = 'interrupt' THEN
            UPDATE turns t SET cancel_requested = true
            WHERE t.tenant = of_tenant AND t.session_id = of_session AND t.state <> 'done';
        END IF;
        INSERT INTO turns AS t (tenant, session_id, id, state, idempotency_key, request_hash,
                                input, options)
        VALUES (of_tenant, of_session, new_turn, 'accepted', new_key, new_hash,
                new_input, new_options)
        RETURNING t.ordinal, extract(epoch FROM t.accepted_at)::float8
        INTO turn_ordinal, turn_at;
        at_inbox := s.inbox + 1;
        UPDATE sessions SET inbox = inbox + 1, latest_turn = new_turn, parked_reason = NULL,
            updated_at = now()
        WHERE tenant = of_tenant AND id = of_session;
    END
    $accept$;

    -- Appends to many sessions in one round trip. heads has an object for each of them, bodies its
    -- n events, a line each, one append's behind the other's. Each lands whole or not at all.
    -- - A row that somebody else holds is left for the next batch instead of stalling this one.
    -- - Epoch, contiguity and inbox are compared on the locked row, not on the snapshot's.
    -- - A turn's id or idempotency key that exists already refuses its own append and no other.
    -- A loop, not one statement over sets: that one's joins cost more than its rows, and its plan
    -- depended on statistics. Texts, not arrays: the client took 0.1 ms to make a dozen arrays.
    CREATE FUNCTION append_events(heads json, bodies text)
    RETURNS TABLE (outcome text, at_epoch bigint, at_seq bigint)
    LANGUAGE plpgsql VOLATILE AS $append$
    DECLARE
        lines text[] := string_to_array(bodies, E'\\n');
        a record;
        s record;
        done int := 0;
    BEGIN
        FOR a IN
            SELECT * FROM json_to_recordset(heads) AS a(
                tenant text, id text, epoch bigint, first_seq bigint, n int, inbox bigint,
                born text, key text, hash text, options text,
                started text, ended text, status text, cost float8)
        LOOP
            done := done + a.n;
            SELECT t.epoch, t.last_seq, t.inbox INTO s FROM sessions t
            WHERE t.tenant = a.tenant AND t.id = a.id FOR UPDATE SKIP LOCKED;
            IF NOT FOUND THEN
                PERFORM 1 FROM sessions t WHERE t.tenant = a.tenant AND t.id = a.id;
                outcome := CASE WHEN FOUND THEN 'locked' ELSE 'gone' END;
                at_epoch := 0;
                at_seq := 0;
                RETURN NEXT;
                CONTINUE;
            END IF;
            at_epoch := s.epoch;
            at_seq := s.last_seq;
            outcome := CASE
                WHEN s.epoch <> a.epoch OR s.last_seq + 1 <> a.first_seq THEN 'stale'
                WHEN a.inbox <> s.inbox THEN 'mail'
                ELSE 'landed'
            END;
            IF outcome = 'landed' AND a.born IS NOT NULL THEN
                INSERT INTO turns (tenant, session_id, id, state, idempotency_key, request_hash,
                                   options, first_seq)
                VALUES (a.tenant, a.id, a.born, 'running', a.key, a.hash, a.options, a.first_seq)
                ON CONFLICT DO NOTHING;
                IF NOT FOUND THEN
                    outcome := 'duplicate';
                END IF;
            END IF;
            IF outcome = 'landed' THEN
                at_seq := a.first_seq + a.n - 1;
                FOR k IN 1 .. a.n LOOP
                    INSERT INTO events (tenant, session_id, seq, epoch, body)
                    VALUES (a.tenant, a.id, a.first_seq + k - 1, a.epoch,
                            lines[done - a.n + k]);
                END LOOP;
                UPDATE sessions t SET
                    last_seq = at_seq,
                    updated_at = now(),
                    turns = t.turns + (a.born IS NOT NULL OR a.started IS NOT NULL)::int,
                    cost = t.cost + coalesce(a.cost, 0),
                    latest_turn = coalesce(a.born, t.latest_turn)
                WHERE t.tenant = a.tenant AND t.id = a.id;
                IF a.started IS NOT NULL THEN
                    UPDATE turns t SET state = 'running', first_seq = a.first_seq, input = NULL
                    WHERE t.tenant = a.tenant AND t.session_id = a.id AND t.id = a.started;
                END IF;
                IF a.ended IS NOT NULL THEN
                    UPDATE turns t SET state = 'done', status = a.status,
                        finished_at = now(), last_seq = at_seq
                    WHERE t.tenant = a.tenant AND t.session_id = a.id AND t.id = a.ended;
                END IF;
            END IF;
            RETURN NEXT;
        END LOOP;
    END
    $append$;
    """,
)
